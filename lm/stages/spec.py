"""A stage: a spec, which the registry lists, and a task, which does its work in one run.

A new stage is one file: a `Task` with its loss and where its batches come from, a `StageSpec`, and a line in the
registry (`lm.stages.STAGES`). The runner, the loop and the commands know no stage by name.
"""

import abc
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from lm.config import Config
from lm.data.prompts import Prompt
from lm.data.records import Kind
from lm.model import adapters, parameters
from lm.model.adapters import ADAPTERS
from lm.model.config import ModelConfig
from lm.model.roles import ADAPTER_OF, SCORED
from lm.runs import loading, saved_config
from lm.runs.saved_config import Parent
from lm.stages import plan
from lm.training import flops
from lm.training import step as training
from lm.training.recorder import Recorder

Batch = Mapping[str, jax.Array]
Source = Callable[[Any, int], Batch]  # (state, i) -> batch i; only an online task looks at the state
Say = Callable[[str], None]
# Packed rows of tokens.
IDS = ('tokens_BT', 'targets_BT', 'segments_BT', 'positions_BT')
ROWS = dict.fromkeys(IDS, np.int32) | {'weights_BT': np.float32}


@dataclass(eq=False)
class Task(abc.ABC):
    """The work of a stage in one run. It closes over its data and what it was asked for.

    Attributes:
      config: resolved but for what the plan finds out (the microbatch).
      data: has a `tokenizer`, and a `fingerprint` that changes with all it is made of; None in a dry run, which reads
        none.
      prompts: the fixed prompts to answer at evaluations. recorder: where it tells and keeps what it measures.
    """

    config: Config
    cfg: ModelConfig
    data: Any = None
    prompts: Sequence[Prompt] = ()
    recorder: Recorder = field(default_factory=Recorder)

    makes: ClassVar[str] = 'policy'  # the role of the model that is trained
    online: ClassVar[bool] = False  # whether batches depend on the state; many of their rows may then hold nothing
    until: ClassVar[tuple[str, ...]] = ()  # settings of which one has to change before a run goes on after its alarm

    def __post_init__(self) -> None:  # noqa: B027 (most keep nothing)
        """Makes what the task keeps between steps."""

    # ---- what a step is made of ----

    @property
    def adapter(self) -> str | None:
        """The kind of the adapter that is trained, of `adapters.ADAPTERS`; None: the model's own weights are."""
        return 'lora' if 'lora' in self.config and self.config.lora.rank else None

    @property
    def trains(self) -> str:
        """The role of what is trained."""
        return self.makes if self.adapter is None else ADAPTER_OF[self.makes]

    @property
    def frozen(self) -> Mapping[str, str]:
        """{role of what the step reads and does not train: the setting that names the run it comes from}."""
        return MappingProxyType({} if self.adapter is None else {'base': 'init_from'})

    @abc.abstractmethod
    def loss(self) -> training.Loss:
        """The loss, a function of the models by their role and a batch."""

    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch as shapes and shardings, at most these in a dry run: `tokens_BT`, `segments_BT`, `weights_BT` and
        what else the loss takes."""
        shape = self.config.batch_size, self.config.seq_len
        return plan.abstract_batch({name: (shape, dtype) for name, dtype in ROWS.items()})

    @abc.abstractmethod
    def source(self, start: int) -> Source:
        """source(state, i): batch i, from `start` on, on this process's devices."""

    def abstract_roles(self) -> dict[str, Any]:
        """{role: the parameters that are trained, as shapes and shardings}: mostly of one role."""
        if self.adapter is None:
            return {self.trains: loading.abstract_params(self.cfg, self.makes)}
        return {self.trains: self.abstract_adapter(self.makes, 'base')}

    def abstract_adapter(self, makes: str, under: str) -> Any:
        """The adapter of a model, over a role that is read, as shapes and shardings."""
        assert self.adapter is not None
        base = self.abstract_frozen(under)
        return loading.abstract_adapter(self.adapter, base, self.cfg, self.config, scored=makes in SCORED)

    def abstract_frozen(self, role: str) -> Any:
        """Returns the parameters of a role that is read, as shapes and shardings. A base that is an adapter itself is
        one, over another, unless it is merged."""
        merge = role != 'base' or self.config.lora.merge
        return loading.abstract_parent(self.config[self.frozen[role]], self.cfg, role, merge=merge)

    def begin(self, abstract: Mapping[str, Any], frozen: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Parent]]:
        """({role: the weights to begin with}, {role: the run they come from}) of what is trained, beside what is
        read."""
        weights, parent = self.first_weights(abstract[self.trains], frozen)
        return {self.trains: weights}, {self.trains: parent} if parent else {}

    def first_weights(self, abstract: Any, frozen: Mapping[str, Any]) -> tuple[Any, Parent | None]:
        """(the weights to begin with, the run they come from): those of init_from, else random ones and None; of an
        adapter those that it begins with."""
        if self.adapter is not None:
            return self.first_adapter(abstract, frozen['base']), None
        if not self.config.init_from:
            return parameters.init_sharded(jax.random.key(self.config.seed), self.cfg), None
        weights, parent = loading.weights(self.config.init_from, abstract, warn=self.recorder.say)
        self.recorder.say(f'weights from {self.config.init_from} at step {parent.step}')
        return weights, parent

    def first_adapter(self, abstract: Any, base: Any) -> Any:
        """An adapter as it begins, over a base."""
        assert self.adapter is not None
        init, settings = ADAPTERS[self.adapter].init, adapters.settings_of(self.config, self.adapter)
        begin = jax.jit(lambda key, base: init(key, base, settings), out_shardings=loading.shardings_of(abstract))
        return begin(jax.random.key(self.config.seed), base)

    def cost(self) -> flops.Cost:
        """Model FLOPs of a step."""
        return self.lm_cost()

    def lm_cost(self, *, head: bool = True, forwards: int = 0) -> flops.Cost:
        """Model FLOPs of training a language model, see `flops.cost`."""
        width, factors = self.batch()['tokens_BT'].shape[1], None
        if self.adapter is not None:
            factors = sum(x.size for x in jax.tree.leaves(self.abstract_roles()[self.trains]))
        return flops.cost(self.cfg, seq_len=width, head=head, forwards=forwards, factors=factors)

    @property
    def rates(self) -> Mapping[str, Any]:
        """{role of what is trained: the multiple of the learning rate for it, or for each of its parts}, 1 for the
        others."""
        if self.adapter is None:
            return MappingProxyType({})
        rates, settings = ADAPTERS[self.adapter].rates, adapters.settings_of(self.config, self.adapter)
        return {role: rates(tree, settings) for role, tree in self.abstract_roles().items()}

    # ---- around the steps ----

    @abc.abstractmethod
    def epoch(self) -> int:
        """Steps in one epoch of the data."""

    def describe(self) -> list[str]:
        """Lines on what is about to be trained on."""
        return []

    def heldout_prompts(self) -> list[Prompt]:
        """Held-out beginnings to be answered, where the data are not the default ones."""
        return []

    def precompute(self, parents: Mapping[str, Parent]) -> dict[str, Parent]:
        """Asks another model what it has to say of the data, before the first step; returns that model by its role.

        Args:
          parents: those of a run that goes on.
        """
        del parents
        return {}

    def evaluate(self, state: training.TrainState, step: int) -> Mapping[str, float]:
        """Metrics of the state, `eval/…`."""
        del state, step
        return {}

    def told(self) -> Mapping[str, float]:
        """Metrics of what the next step learns from, beside its own."""
        return {}

    def panel(self) -> str:
        """The same in a few words, for the progress bar."""
        return ''

    def alarm(self, metrics: Mapping[str, float]) -> str | None:
        """Returns why training has to end now, by the metrics of a step or an evaluation; None: it has not to."""
        del metrics
        return None

    def state_dict(self) -> dict[str, Any]:
        """Arrays that resuming needs beside the state and the step, at any time of the same shapes."""
        return {}

    def load(self, arrays: Mapping[str, Any]) -> None:  # noqa: B027 (most keep nothing)
        """Takes up what `state_dict` gave when the checkpoint was saved."""

    def at(self, microbatch: int) -> 'Task':
        """The same task with its microbatch resolved."""
        # `ConfigDict(config)` would not do: a copy made so shares the references that placeholders are, and setting one
        # sets the other (ml_collections 1.1).
        task = copy.copy(self)
        task.config = self.config.copy_and_resolve_references()
        task.config.execution.microbatch = microbatch
        return task


class StageSpec(NamedTuple):
    """A stage, as the registry lists it."""

    name: str  # configs/NAME.py, --config.stage
    data: Kind  # of records it learns from
    output: str  # 'text' that continues, 'answers' in a conversation, or 'scores'
    # (config, tokenizer's folder or None, say) -> data: reads them, or finds them in the cache
    prepare: Callable[[Config, str | None, Say], Any]
    # (config, cfg, data, prompts, recorder) -> the task
    open: Callable[..., Task]
    # config -> None. Raises UsageError for settings that make no sense, before anything is read
    check: Callable[[Config], None] = lambda config: None
    # config -> None. Sets what the stage decides for itself where it is None, before that
    settle: Callable[[Config], None] = lambda config: None

    @property
    def about(self) -> saved_config.About:
        return saved_config.About(self.data, self.output)
