"""The named exceptions: each is a mistake that its reader can mend, told in one sentence."""

import errno

_OF_THE_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would be larger than this process may write (ulimit -f)",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.ENOTDIR: "a file is there where a folder is needed",
    errno.EEXIST: "a file is there where a folder is needed",
    errno.EISDIR: "a folder is there where a file is needed",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EIO: "the disk reports an input/output error",
}


class UserError(ValueError):
    """A mistake outside this library's code; the message says what came, what was expected, and what to do."""


class ConfigError(UserError):
    """A setting is misspelt, of the wrong kind, out of its range, or contradicts another."""


class TargetError(UserError):
    """The modules that a method should take are not there, or are of a kind that it cannot take."""


class DataError(UserError):
    """A data file is missing, malformed, or does not hold what the task needs."""


class BackboneError(UserError):
    """A backbone cannot be found or loaded."""


class CheckpointError(UserError):
    """A checkpoint or adapter folder is missing, damaged, or belongs to another model."""


class UploadError(UserError):
    """The Hub did not take what was written; the files stay where they are."""


class TrainingError(UserError):
    """A run cannot continue: its loss or its gradients are not finite, or its memory is full."""


class NotMergeable(UserError):  # noqa: N818 - reads as the fact it states; the name is public API
    """An adapter cannot be folded into the weights of its host."""


class PackedHost(NotMergeable):
    """A host stores its weight quantized, and no update can be written into it as it is."""


class RankLost(UserError):  # noqa: N818 - reads as the fact it states
    """Another rank of the run is gone, so that this one ends too; the run can be started again."""

    status = 75
    """Exit status of the command: what sysexits.h calls a temporary failure."""


class AdapterNotCalled(UserError):  # noqa: N818 - reads as the fact it states; the name is public API
    """A forward pass went by without calling an adapter, which would therefore never learn."""


def trouble_of_disk(error: BaseException) -> str | None:
    """Say in words what the system refuses about its disk, or None where an error is none of these.

    Example:
        >>> trouble_of_disk(OSError(errno.ENOSPC, "No space left on device"))
        'the disk is full'
    """
    return _OF_THE_DISK.get(error.errno or 0) if isinstance(error, OSError) else None
