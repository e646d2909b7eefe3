"""The public names, a line each, and the commands with their help. Written by scripts/public; do not edit."""

from lora_lightning.adapters.attaching.detach import detach as detach
from lora_lightning.adapters.selection.blocks import active as active
from lora_lightning.adapters.selection.blocks import disabled as disabled
from lora_lightning.adapters.selection.blocks import set_active as set_active
from lora_lightning.adapters.selection.state import bind as bind
from lora_lightning.adapters.state import adapter_state_dict as adapter_state_dict
from lora_lightning.adapters.state import load_adapter_state_dict as load_adapter_state_dict
from lora_lightning.adapters.state import refresh as refresh
from lora_lightning.adapters.walk import adapter_names as adapter_names
from lora_lightning.arithmetic.combine import combine as combine
from lora_lightning.arithmetic.moments import input_moments as input_moments
from lora_lightning.arithmetic.nested import at_rank as at_rank
from lora_lightning.arithmetic.shrink import shrink as shrink
from lora_lightning.backbones.attach import attach as attach
from lora_lightning.backbones.attach import merge as merge
from lora_lightning.backbones.quantization import Quantization as Quantization
from lora_lightning.backbones.rows import per_row as per_row
from lora_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint as AdapterCheckpoint
from lora_lightning.callbacks.adapter_finetuning import AdapterFinetuning as AdapterFinetuning
from lora_lightning.callbacks.adapter_summary import AdapterSummary as AdapterSummary
from lora_lightning.callbacks.guards import Guards as Guards
from lora_lightning.callbacks.idle_parameter_guard import IdleParameterGuard as IdleParameterGuard
from lora_lightning.callbacks.merge_at_end import MergeAtEnd as MergeAtEnd
from lora_lightning.callbacks.metric_curve import MetricCurve as MetricCurve
from lora_lightning.callbacks.non_finite_guard import NonFiniteGuard as NonFiniteGuard
from lora_lightning.callbacks.out_of_memory_guard import OutOfMemoryGuard as OutOfMemoryGuard
from lora_lightning.callbacks.paced_progress_bar import PacedProgressBar as PacedProgressBar
from lora_lightning.callbacks.plain_progress import PlainProgress as PlainProgress
from lora_lightning.callbacks.prediction_writer import PredictionWriter as PredictionWriter
from lora_lightning.callbacks.rank_watch import RankWatch as RankWatch
from lora_lightning.callbacks.run_report import RunReport as RunReport
from lora_lightning.callbacks.sample_generations import SampleGenerations as SampleGenerations
from lora_lightning.callbacks.signal_guard import SignalGuard as SignalGuard
from lora_lightning.callbacks.throughput import Throughput as Throughput
from lora_lightning.checkpoint.folder import load_adapter as load_adapter
from lora_lightning.checkpoint.peft_folder import export_peft as export_peft
from lora_lightning.checkpoint.peft_folder import load_peft as load_peft
from lora_lightning.data.instruction_data import InstructionData as InstructionData
from lora_lightning.data.multiple_choice import MultipleChoiceData as MultipleChoiceData
from lora_lightning.data.seq2seq import Seq2SeqData as Seq2SeqData
from lora_lightning.data.text_classification import TextClassificationData as TextClassificationData
from lora_lightning.data.token_classification import TokenClassificationData as TokenClassificationData
from lora_lightning.finetuning.attaching import finetune as finetune
from lora_lightning.finetuning.loading import load_finetuned as load_finetuned
from lora_lightning.finetuning.merging import merge_finetuned as merge_finetuned
from lora_lightning.merging.merge import merge_checkpoint as merge_checkpoint
from lora_lightning.methods.adalora import AdaLoRA as AdaLoRA
from lora_lightning.methods.bitfit import BitFit as BitFit
from lora_lightning.methods.bottleneck import BottleneckAdapter as BottleneckAdapter
from lora_lightning.methods.delta_lora import DeltaLoRA as DeltaLoRA
from lora_lightning.methods.dora import DoRA as DoRA
from lora_lightning.methods.ia3 import IA3 as IA3
from lora_lightning.methods.lora import LoRA as LoRA
from lora_lightning.methods.lora_drop import LoRADrop as LoRADrop
from lora_lightning.methods.lora_fa import LoRAFA as LoRAFA
from lora_lightning.methods.p_tuning import PTuning as PTuning
from lora_lightning.methods.p_tuning_v2 import PTuningV2 as PTuningV2
from lora_lightning.methods.prefix_tuning import PrefixTuning as PrefixTuning
from lora_lightning.methods.prompt_tuning import PromptTuning as PromptTuning
from lora_lightning.methods.recompute import recompute_activations as recompute_activations
from lora_lightning.methods.trainable_tokens import TrainableTokens as TrainableTokens
from lora_lightning.methods.vera import VeRA as VeRA
from lora_lightning.optim.config import Optim as Optim
from lora_lightning.optim.groups import param_groups as param_groups
from lora_lightning.peft_format.preflight import preflight as preflight
from lora_lightning.resume.exact_resume import ExactResume as ExactResume
from lora_lightning.strategies.fsdp2 import FSDP2Strategy as FSDP2Strategy
from lora_lightning.tasks.base import AdapterTask as AdapterTask
from lora_lightning.tasks.causal_lm import CausalLM as CausalLM
from lora_lightning.tasks.multiple_choice import MultipleChoice as MultipleChoice
from lora_lightning.tasks.per_token import PerTokenTask as PerTokenTask
from lora_lightning.tasks.seq2seq import Seq2SeqLM as Seq2SeqLM
from lora_lightning.tasks.sequence_classification import SequenceClassification as SequenceClassification
from lora_lightning.tasks.step_output import StepOutput as StepOutput
from lora_lightning.tasks.token_classification import TokenClassification as TokenClassification
from lora_lightning.tasks.token_loss import TokenSums as TokenSums

__version__: str

# command cache: List or clear the rows and tokens that data modules keep between runs.
# command chat: Chat with a fine-tuned language model; Ctrl-D exits.
# command combine: Add, subtract or mix adapters of one base into a new adapter, and tell the error.
# command compare: Train several methods on one task within one budget, and compare them.
# command completion: Print the completion script of a shell, for commands, settings, classes and files.
# command export: Write a checkpoint's adapter for other tools, in PEFT's format or merged into its base.
# command generate: Write on from a prompt, or from each prompt of a file, with a fine-tuned language model.
# command init: Analyse data and write a config that trains on them.
# command merge: Merge a checkpoint's adapter into its base and write a plain Hugging Face folder.
# command plan: Report the memory that a config needs, part by part, and whether it fits a GPU.
# command schema: Write the JSON Schema of config files, with which editors complete and check them.
# command shrink: Cut an adapter to a budget of parameters, an error or a rank, and tell the error.
