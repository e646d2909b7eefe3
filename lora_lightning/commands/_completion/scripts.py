"""The completion scripts of the shells."""

from __future__ import annotations

BASH = r"""# lora-lightning: completion for bash.
_lora_lightning() {
    local line current="${COMP_WORDS[COMP_CWORD]}"
    COMPREPLY=()
    [ "$current" = "=" ] && current=""
    while IFS= read -r line; do
        if [ "$line" = ":files" ]; then
            compopt -o filenames 2>/dev/null
            while IFS= read -r line; do COMPREPLY+=("$line"); done < <(compgen -f -- "$current")
        else
            COMPREPLY+=("${line%%$'\t'*}")
        fi
    done < <("${COMP_WORDS[0]}" __complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
    if [ "${#COMPREPLY[@]}" -eq 1 ] && [[ "${COMPREPLY[0]}" == *. ]]; then
        compopt -o nospace 2>/dev/null
    fi
}
complete -F _lora_lightning lora-lightning
"""
ZSH = r"""#compdef lora-lightning
# lora-lightning: completion for zsh.
_lora_lightning() {
    local line word
    local -a described groups
    while IFS= read -r line; do
        word="${line%%$'\t'*}"
        if [[ "$line" == ":files" ]]; then
            _files
        elif [[ "$word" == *. ]]; then
            groups+=("$word")
        else
            described+=("${word//:/\\:}:${line#*$'\t'}")
        fi
    done < <("${words[1]}" __complete "${(@)words[2,CURRENT]}" 2>/dev/null)
    (( ${#groups} )) && compadd -S '' -- "${groups[@]}"
    (( ${#described} )) && _describe 'lora-lightning' described
}
if [ "$funcstack[1]" = "_lora_lightning" ]; then
    _lora_lightning "$@"
else
    compdef _lora_lightning lora-lightning
fi
"""
FISH = r"""# lora-lightning: completion for fish.
function __lora_lightning_complete
    set -l before (commandline -opc)
    set -l current (commandline -ct)
    set -l program $before[1]
    set -e before[1]
    for line in ($program __complete $before "$current" 2>/dev/null)
        if test "$line" = ":files"
            __fish_complete_path "$current"
        else
            echo $line
        end
    end
end
complete -c lora-lightning -f -a '(__lora_lightning_complete)'
"""
SHELLS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
"""The script of each shell."""
