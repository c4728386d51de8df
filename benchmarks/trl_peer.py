"""TRL as a peer: its trainers' steps on a CPU, at several settings (`pip install -e '.[peers]'`)."""

import itertools
import logging
import os
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from peers import torch_llama
from posttraining import POOL, RATE, Clock, Example, Iteration, Ledger, Ours, Side

from lm.model import parameters
from lm.model.config import ModelConfig

os.environ.setdefault('TQDM_DISABLE', '1')
IGNORED = -100
PADDED_SIZES, PACKED_SIZES = (4, 8, 16), (1, 2, 4)  # conversations, and packed rows, at once
GRPO_SETTINGS = (8, 'dynamic'), (16, 'dynamic'), (32, 'dynamic'), (16, 'static')  # responses at once, and its cache
ROLLOUTS = 8  # whose prompts it has
DPO_SIZES = {'group_by_length': (4, 8, 16), 'random': (8,)}  # pairs at once, by the order of its sampler


def sft(ours: Ours, *, steps: int, longest: int) -> list[Side]:
    """SFTTrainer with padding and grouping by length, and with packing."""
    from trl import SFTConfig, SFTTrainer

    rows = [_labelled(*example) for example in ours.examples]

    def side(name: str, size: int, **options: Any) -> Side:
        config = SFTConfig(**_arguments(size), max_length=longest, **options)
        trainer = SFTTrainer(_model(ours, longest), config, **_data(rows, ours.cfg))
        return _side(f'{name}, {size} at once', trainer, steps)

    padded = [side('padded, group_by_length', n, train_sampling_strategy='group_by_length') for n in PADDED_SIZES]
    return padded + [side('packed', n, packing=True) for n in PACKED_SIZES]


def dpo(ours: Ours, reference: np.ndarray, *, steps: int, longest: int) -> list[Side]:
    """DPOTrainer with the reference's log-probs, [pairs, 2], known before."""
    from trl import DPOConfig, DPOTrainer

    class Known(DPOTrainer):
        """One whose data are ids and have the log-probs already; it would make both itself, before it trains."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
            return dataset

    rows = [_pair(example, *known) for example, known in zip(ours.examples, reference.tolist(), strict=True)]

    def side(order: str, size: int) -> Side:
        config = DPOConfig(
            **_arguments(size), max_length=longest, precompute_ref_log_probs=True, remove_unused_columns=False,
            train_sampling_strategy=order,
        )  # fmt: skip
        trainer = Known(_model(ours, longest), args=config, **_data(rows, ours.cfg))
        return _side(f'{order}, {size} pairs at once', trainer, steps)

    return [side(order, n) for order, sizes in DPO_SIZES.items() for n in sizes]


def grpo(task: Any, reward: Callable[[Any, Any], list[float]], *, only: str | None) -> list[Iteration]:
    """GRPOTrainer with transformers' generation, on the prompts of a task of ours in their order, from the weights that
    our side began with; a response ends with the ids that end ours. At all settings, or the one of this name."""
    from trl import GRPOConfig, GRPOTrainer

    config, cfg, rl = task.config, task.cfg, task.config.rl
    decode, clock = task.data.tokenizer.decode, Clock()

    class Timed(GRPOTrainer):
        """One with a clock, whose prompts are ids."""

        def _tokenize_prompts(self, prompts: list[Any]) -> Any:
            return [list(map(int, prompt.split())) for prompt in prompts], None, {}

        def _generate_single_turn(self, *given: Any, **named: Any) -> Any:
            with clock('generation'):
                return super()._generate_single_turn(*given, **named)

        def _generate_and_score_completions(self, *given: Any) -> Any:
            with clock('scoring'):
                return super()._generate_and_score_completions(*given)

    def score(prompts: Any, completions: Any, completion_ids: Any, **_: Any) -> list[float]:
        return reward(prompts, [decode(ids) for ids in completion_ids])

    prompts = [q.prompt for i in range(ROLLOUTS) for q in task.questions(i)]
    rows = [{'prompt': ' '.join(map(str, ids))} for ids in prompts]
    params = parameters.init_sharded(jax.random.key(0), cfg)

    def side(name: str, size: int, cache: str) -> Iteration:
        arguments = GRPOConfig(
            **_arguments(size), num_generations=rl.group, generation_batch_size=task.responses,
            gradient_accumulation_steps=config.batch_size // size, max_completion_length=rl.max_new_tokens,
            temperature=rl.temperature, epsilon=rl.clip_low, epsilon_high=rl.clip_high, scale_rewards='none',
            shuffle_dataset=False, cache_implementation=cache,
        )  # fmt: skip
        model = torch_llama(params, cfg, length=config.seq_len, attention='sdpa')
        model.generation_config.eos_token_id = [i for i in task.data.stop_ids if i < cfg.vocab_size] or None
        trainer = Timed(model, score, args=arguments, **_data(rows, cfg))
        return _iteration(name, trainer, task.updates, clock)

    settings = {
        f'{size} at once, {cache} cache': (min(size, config.batch_size), cache) for size, cache in GRPO_SETTINGS
    }
    return [side(name, *setting) for name, setting in settings.items() if only in (None, name)]


def _iteration(name: str, trainer: Any, updates: int, clock: Clock) -> Iteration:
    """A rollout of the trainer and the updates on it."""
    batches = itertools.chain.from_iterable(iter(trainer.get_train_dataloader, None))
    trainer.create_optimizer()
    accumulate = trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps

    def iterate() -> Ledger:
        trainer.model.train()
        with clock('update'):
            for _ in range(updates):
                for batch in itertools.islice(batches, accumulate):
                    trainer.training_step(trainer.model, batch, None)
                _update(trainer)
        length = trainer._metrics['train']['completions/mean_length'][-1]
        return clock.ledger(tokens=length * trainer.args.generation_batch_size)

    return Iteration(name, iterate)


def _update(trainer: Any) -> None:
    """Clips the gradients and takes a step on them."""
    import torch

    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)


def _labelled(conversation: tuple[list[int], list[bool]]) -> dict[str, Any]:
    ids, trained = conversation
    return {'input_ids': ids, 'labels': [i if t else IGNORED for i, t in zip(ids, trained, strict=True)]}


def _pair(example: Example, ref_chosen: float, ref_rejected: float) -> dict[str, Any]:
    (chosen, trained), (rejected, _) = example
    prompt = trained.index(True)
    return {
        'prompt_ids': chosen[:prompt], 'chosen_ids': chosen[prompt:], 'rejected_ids': rejected[prompt:],
        'ref_chosen_logps': ref_chosen, 'ref_rejected_logps': ref_rejected, 'length': max(len(chosen), len(rejected)),
    }  # fmt: skip


def _arguments(size: int) -> dict[str, Any]:
    """The settings that all trainers share."""
    return {
        'output_dir': tempfile.gettempdir(), 'per_device_train_batch_size': size, 'use_cpu': True, 'bf16': False,
        'gradient_checkpointing': False, 'optim': 'adamw_torch_fused', 'weight_decay': 0.1, 'max_grad_norm': 1.0,
        'learning_rate': float(RATE), 'report_to': 'none', 'save_strategy': 'no', 'disable_tqdm': True,
    }  # fmt: skip


def _model(ours: Ours, longest: int) -> Any:
    return torch_llama(ours.params, ours.cfg, length=longest, attention='sdpa')


def _data(rows: list[Any], cfg: ModelConfig) -> dict[str, Any]:
    """The examples, and the tokenizer that a trainer asks for and has no use for: a word for each id."""
    import datasets
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    datasets.disable_progress_bars()
    logging.getLogger('transformers').setLevel(logging.ERROR)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(cfg.vocab_size)}, unk_token='0'))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token='0', eos_token='0')
    return {'train_dataset': datasets.Dataset.from_list(rows), 'processing_class': tokenizer}


def _side(name: str, trainer: Any, steps: int) -> Side:
    """A round of the trainer: of the batches that it makes of all examples, as many, evenly spread, as `steps` of ours
    have of them, in as many updates."""
    batches = list(trainer.get_train_dataloader())
    batches = batches[:: max(1, POOL // steps)]
    groups = [batches[i[0] : i[-1] + 1] for i in np.array_split(np.arange(len(batches)), min(steps, len(batches)))]
    trainer.create_optimizer()

    def update(group: list[Any]) -> float:
        trainer.current_gradient_accumulation_steps = len(group)
        learned = sum((b['labels'][:, 1:] != IGNORED).sum() for b in group) if 'labels' in group[0] else None
        losses = [trainer.training_step(trainer.model, dict(batch), learned) for batch in group]
        _update(trainer)
        return float(sum(losses))

    def train() -> float:
        return float(np.mean([update(group) for group in groups]))

    places = sum(b['input_ids'].numel() for b in batches)
    real = sum(int(b['attention_mask'].sum()) if 'attention_mask' in b else b['input_ids'].numel() for b in batches)
    return Side(name, train, real, places, 1 - real / places)
