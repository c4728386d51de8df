"""Every setting: its default, what it may be, and what it means, in one place.

A stage takes the settings of its class, here or beside the stage: `Settings`, which all have, and its own. `lm.config`
makes a ConfigDict of a class, reads the command line, and says in one line what is wrong.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

INT32_MAX = 2**31 - 1  # counts and places are int32 on the device
SEED_MAX = 2**32 - 1  # a larger seed would be cut to these bits
FLOAT32_END = 2.0**128  # the first number that float32 has no room for
MAX_BATCH_WARMUP = 10**6  # the batch of each of these steps is in a table
MAX_NEW_TOKENS = 10**6  # the cache has a place for each


class Bound(NamedTuple):
    """The values that a setting may have, in words and as a test; `choices`: it is one of these."""

    words: str
    holds: Callable[[Any], bool]
    choices: tuple[str, ...] = ()

    def obstacle(self, value: Any) -> str | None:
        """The rest of a sentence on a value that a saved file has, if it cannot be."""
        try:
            sound = self.holds(value)
        except TypeError:  # a text for a number
            sound = False
        if sound:
            return None
        return f'is not one of {", ".join(self.choices)}' if self.choices else f'must be {self.words}'


def one_of(*names: str) -> Bound:
    return Bound('', lambda x: x in names, names)


def up_to(most: int, least: int = 0) -> Bound:
    return Bound(f'from {least} to {most}', lambda x: least <= x <= most)


COUNT, COUNT_OR_0 = up_to(INT32_MAX, 1), up_to(INT32_MAX)
POSITIVE = Bound('positive and finite', lambda x: 0 < x < FLOAT32_END)
FINITE = Bound('finite', lambda x: abs(x) < FLOAT32_END)
FROM_1 = Bound('at least 1 and finite', lambda x: 1 <= x < FLOAT32_END)
FROM_0 = Bound('at least 0 and finite', lambda x: 0 <= x < FLOAT32_END)
PART = Bound('from 0 to 1', lambda x: 0 <= x <= 1)
DECAY = Bound('from 0 to below 1', lambda x: 0 <= x < 1)
INNER = Bound('between 0 and 1', lambda x: 0 < x < 1)
SHARE = Bound('above 0 and at most 1', lambda x: 0 < x <= 1)
SOFTENED = Bound('from 0.01 to 100', lambda x: 0.01 <= x <= 100)
REPLAYED = Bound('from 0 to 0.9', lambda x: 0 <= x <= 0.9)


def setting(default: Any, meaning: str, bound: Bound | None = None) -> Any:
    """A field of a class of settings. One that may be none says so by its type (`float | None`)."""
    return dataclasses.field(default=default, metadata={'meaning': meaning, 'bound': bound})


# ---- what all stages have ----


ATTENTIONS, REMATS = ('blocks', 'dense', 'cudnn', 'splash'), ('auto', 'none', 'dots', 'names', 'full')


@dataclass(frozen=True)
class Execution:
    """The execution of the program, which changes rounding, time and memory alone. None: decided for the platform, the
    model and the memory, see `lm.runs.execution`."""

    dtype: str | None = setting(None, 'of activations; None: bfloat16, on CPU float32', one_of('float32', 'bfloat16'))
    attention: str | None = setting(None, "None: the platform's own, said when a run starts", one_of(*ATTENTIONS))
    scan: bool | None = setting(None, 'one layer compiled and repeated, or all of them; None: by depth')
    remat: str = setting('auto', 'what the backward pass computes again, not kept; auto: what fits', one_of(*REMATS))
    microbatch: int | None = setting(None, 'sequences in memory at once; None: measured', COUNT)


@dataclass(frozen=True)
class Model:
    """The graph, and its sizes; `lm.model.config.ModelConfig` adds how it is run."""

    vocab_size: int = setting(4096, 'ids, before padding', COUNT)
    dim: int = setting(128, 'width of the residual stream', COUNT)
    layers: int = setting(4, 'depth', COUNT)
    heads: int = setting(4, 'query heads', COUNT)
    kv_heads: int = setting(4, 'key and value heads; heads is a multiple of them', COUNT)
    head_dim: int = setting(32, 'width of a head', COUNT)
    ffn_dim: int = setting(384, 'width of the feed-forward', COUNT)
    rope_theta: float = setting(10_000.0, 'base of the rotary frequencies', FROM_1)
    norm_eps: float = setting(1e-6, 'added to the mean square in a norm', POSITIVE)
    qk_norm: bool = setting(True, 'RMS-normalise queries and keys per head')
    qk_norm_joint: bool = setting(False, 'RMS-normalise queries and keys over all heads at once (OLMo 2)')
    tied: bool = setting(True, 'one matrix for the embedding and the head')
    qkv_bias: bool = setting(False, 'biases of queries, keys and values (Qwen 2)')
    norms: str = setting('pre', 'of what a sub-layer reads, adds (OLMo 2), both (Gemma)', one_of('pre', 'post', 'both'))
    norm_plus_one: bool = setting(False, 'norms multiply by 1 + their weight (Gemma)')
    activation: str = setting('silu', 'of the gate', one_of('silu', 'gelu'))
    window: int | None = setting(None, 'attend to this many last tokens in local layers; None: all', COUNT)
    pattern: str | None = setting(None, "kinds of layer, repeated, 'local,global' with nope; None: all by window")
    rope_theta_local: float | None = setting(None, "of a pattern's local layers; None: rope_theta", FROM_1)
    rope_scaling: str | None = setting(None, "'linear,factor=8' | 'llama3,factor=8,low=1,high=4,original=8192'")
    query_scale: float | None = setting(None, 'what q·k is multiplied by; None: 1/√head_dim', POSITIVE)
    embed_scale: float | None = setting(None, 'of the embedding (Gemma, Granite)', POSITIVE)
    residual_scale: float | None = setting(None, 'of what is added to the residual stream (Granite)', POSITIVE)
    logit_scale: float | None = setting(None, 'of the logits (Granite)', POSITIVE)
    context: int | None = setting(None, 'tokens that it was made to read at once; None: seq_len', COUNT)
    attn_softcap: float | None = setting(None, 'attention logits stay within ± this (Gemma 2)', POSITIVE)
    logit_softcap: float | None = setting(None, 'logits stay within ± this (Gemma 2)', POSITIVE)


OPTIMIZERS = ('adamw', 'muon', 'adafactor')
SCHEDULES = ('cosine', 'wsd', 'linear', 'constant')


@dataclass(frozen=True)
class Optim:
    name: str = setting('adamw', 'muon: for matrices, AdamW for the rest', one_of(*OPTIMIZERS))
    lr: float = setting(6e-3, 'peak learning rate', POSITIVE)
    schedule: str = setting('linear', 'of the learning rate after the warmup', one_of(*SCHEDULES))
    warmup: int = setting(100, 'steps', COUNT_OR_0)
    batch_warmup: int = setting(0, 'steps in which one microbatch grows to batch_size', up_to(MAX_BATCH_WARMUP))
    decay: float = setting(0.2, 'wsd: the last part of the run over which the rate falls to the final one', PART)
    final: float = setting(0.0, 'the last rate, as a fraction of lr', PART)
    weight_decay: float = setting(0.1, 'not on norms and embeddings', FROM_0)
    clip: float | None = setting(1.0, 'global gradient norm; None: off', POSITIVE)
    b1: float = setting(0.9, "AdamW's decay of the first moment", DECAY)
    b2: float = setting(0.95, "AdamW's decay of the second moment", DECAY)
    eps: float = setting(1e-8, "AdamW's, added to the root of the second moment", POSITIVE)
    momentum: float = setting(0.95, "Muon's, of the matrices", DECAY)
    ema: float | None = setting(None, 'decay of an average of the weights, which is then evaluated and used', INNER)
    max_skips: int = setting(5, 'non-finite steps in a row that are skipped before the run stops', COUNT_OR_0)


@dataclass(frozen=True)
class Data:
    mixture: str = setting('', "'name:weight,…': botocore, files, folders, tfds:NAME, hf:NAME; see lm/data/sources.py")
    tokenizer: str | None = setting(None, "folder or tokenizer.json; None: init_from's, or trained on the mixture")
    heldout: float = setting(0.02, "part of each source's documents that is kept out for evaluation", INNER)


@dataclass(frozen=True)
class Mesh:
    """Devices along each axis; -1 takes those that are left."""

    data: int = setting(1, 'copies of the weights, each with rows of its own')
    fsdp: int = setting(-1, 'rows, with the weights split over the same devices')
    seq: int = setting(1, 'parts of a sequence')
    tensor: int = setting(1, 'parts of a matrix')
    expert: int = setting(1, 'experts')


@dataclass(frozen=True)
class Lora:
    """Factors of a low rank that are trained in place of the weights, see `lm.model.lora`."""

    rank: int | None = setting(None, 'of each product; None: the weights themselves are trained', COUNT)
    alpha: float = setting(32.0, 'the products are multiplied by alpha/rank', POSITIVE)
    scale: str = setting('alpha/r', 'rs: by alpha/√rank', one_of('alpha/r', 'rs'))
    targets: str | None = setting(None, "'wq,wv:8', of that rank; None: every matrix of the layers")
    dropout: float = setting(0.0, 'part of what a product reads that is left out in training', DECAY)
    plus: float = setting(1.0, "LoRA+: B's rate, as a multiple of A's", POSITIVE)
    dora: bool = setting(False, 'DoRA: the lengths of the columns are trained apart')
    start: str = setting('zero', 'pissa: from the principal components of each matrix', one_of('zero', 'pissa'))
    merge: bool = setting(False, 'an adapter that the run starts from goes into its base; else it lies under the new')


@dataclass(frozen=True)
class Checkpoint:
    every: int = setting(100, 'steps', COUNT)
    keep: int = setting(3, 'the newest that stay', COUNT)


@dataclass(frozen=True)
class Eval:
    every: int = setting(250, 'steps; the last step is always evaluated', COUNT)
    rows: int = setting(256, 'held-out rows of each source', COUNT)
    prompts: str | None = setting(None, 'a .jsonl file; None: configs/prompts.jsonl, of own data held-out beginnings')
    max_new_tokens: int = setting(48, 'of an answer', up_to(MAX_NEW_TOKENS, 1))


@dataclass(frozen=True)
class Log:
    every: int = setting(10, 'steps between lines of metrics.jsonl', COUNT)
    profile: int | None = setting(None, 'step from which three steps are traced into DIR/profile', COUNT_OR_0)


@dataclass(frozen=True)
class Shared:
    """The settings of all stages and of all jobs."""

    stage: str = setting('pretrain', 'of lm.stages or lm.jobs')
    seed: int = setting(0, 'of everything that is drawn', up_to(SEED_MAX))
    init_from: str | None = setting(None, "DIR[@STEP]: start from that run's (or model's) weights, graph and tokenizer")
    data: Data = Data()
    mesh: Mesh = Mesh()


@dataclass(frozen=True)
class Settings(Shared):
    """The settings of all stages, at the sizes of the laptop run."""

    stage: str = setting('pretrain', 'of lm.stages')
    steps: int | None = setting(None, 'optimizer steps; None: one epoch', COUNT)
    batch_size: int = setting(8, 'sequences a step, over all devices', COUNT)
    seq_len: int = setting(256, 'tokens a sequence', COUNT)
    branch_from: str | None = setting(None, 'DIR[@STEP]: as init_from, with the optimizer and the position in the data')
    execution: Execution = Execution()
    model: Model = Model()
    optim: Optim = Optim()
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()
    log: Log = Log()


# ---- what a stage has beside them ----


@dataclass(frozen=True)
class Pretrain(Settings):
    stage: str = setting('pretrain', 'of lm.stages')
    z_loss: float = setting(1e-4, 'coefficient of the squared logsumexp', FROM_0)


@dataclass(frozen=True)
class DialogueData(Data):
    pretraining: str | None = setting(None, "the mixture of pretraining, '' none; None: that of the run before")
    replay: float = setting(0.0, 'share of the rows that are text of pretraining, against forgetting', REPLAYED)
    strict: bool = setting(False, 'a malformed record ends the run with a line that names it; else it is left out')


@dataclass(frozen=True)
class Sft(Pretrain):
    stage: str = setting('sft', 'of lm.stages')
    data: DialogueData = DialogueData()
    lora: Lora = Lora()


DIVERGENCES = ('forward', 'reverse', 'jsd')


@dataclass(frozen=True)
class Distillation:
    """The loss of a student, see `lm.losses.distill`."""

    divergence: str = setting('forward', 'KL(teacher‖student); reverse: the other; jsd: of both', one_of(*DIVERGENCES))
    jsd_beta: float | None = setting(None, "jsd: the teacher's share of the mixture; None: 0.5", INNER)
    temperature: float = setting(1.0, 'of both distributions; the divergence is multiplied by its square', SOFTENED)
    alpha: float = setting(0.9, 'share of the divergence; the rest is cross-entropy of the data', SHARE)
    top_k: int | None = setting(None, "the teacher's most likely words, asked once; None: all, at each step", COUNT)


@dataclass(frozen=True)
class Distill(Pretrain):
    stage: str = setting('distill', 'of lm.stages')
    teacher_from: str | None = setting(None, 'DIR[@STEP] of the teacher; its tokenizer, and its text where none is set')
    lora: Lora = Lora()
    distill: Distillation = Distillation()


@dataclass(frozen=True)
class Reward(Settings):
    stage: str = setting('reward', 'of lm.stages')
    data: DialogueData = DialogueData()
    lora: Lora = Lora()
    centring: float = setting(1e-2, 'coefficient of (chosen + rejected)²', FROM_0)
    margins: float = setting(0.0, "what a pair's margin is multiplied by; 0: the better one need only lead", FROM_0)


PREFERENCES = ('dpo', 'cdpo', 'robust', 'ipo', 'simpo', 'orpo', 'kto')


@dataclass(frozen=True)
class Dpo(Settings):
    stage: str = setting('dpo', 'of lm.stages')
    data: DialogueData = DialogueData()
    lora: Lora = Lora()
    loss: str = setting('dpo', 'of lm.losses.preference', one_of(*PREFERENCES))
    reference: str = setting('cached', 'log-probs computed once, or at each step', one_of('cached', 'live'))
    beta: float | None = setting(None, "strength of the reference; None, here and below: the loss's own", POSITIVE)
    margin: float | None = setting(None, 'by how much simpo has the chosen response lead', FROM_0)
    label_smoothing: float | None = setting(None, 'cdpo and robust: the part of labels that are wrong')
    lambda_d: float | None = setting(None, 'kto: what a good answer weighs', FROM_0)
    lambda_u: float | None = setting(None, 'kto: what a bad answer weighs', FROM_0)
    nll: float | None = setting(None, "coefficient of the chosen responses' own loss beside it", FROM_0)


@dataclass(frozen=True)
class RewardSource:
    """The sources of a response's score; several are added up."""

    fn: str | None = setting(None, "'package.module:function': (prompts, responses) -> scores; answers= if it asks")
    verify: str | None = setting(None, "'gym', or 'package.module:function': (prompt, response, gold answer) -> score")
    partial: bool = setting(False, 'verify=gym: what the scorer of the set gives; else 1 or 0')
    judge: str | None = setting(
        None, "'package.module:function': (prompts, responses) -> scores, None where it has none"
    )
    seconds: float = setting(5.0, 'CPU time of verify, and of the judge, for a response', POSITIVE)
    failed: float = setting(0.0, 'the score of a response that verify fails on or the judge has none for', FINITE)
    weights: str | None = setting(None, "'model:1,fn:0.5', of reward_from and of those here; None: 1 each")
    normalise: bool = setting(False, 'each source by its mean and standard deviation in the rollout, before its weight')


LEVEL = one_of('token', 'sequence')
LEASHES = ('none', 'reward', 'k3', 'full')
TRUNCATED = one_of('score', 'mask', 'penalty', 'rising')


@dataclass(frozen=True)
class Rl:
    """Rollouts, and what is learned from them."""

    prompts: int = setting(32, 'prompts a rollout', COUNT)
    group: int = setting(8, 'responses to each prompt', COUNT)
    epochs: int = setting(1, 'times that each response is learned from', COUNT)
    max_new_tokens: int = setting(64, 'of a response', up_to(MAX_NEW_TOKENS, 1))
    temperature: float = setting(1.0, 'of the draws, and of every log-prob that is taken of them', POSITIVE)
    ratio: str | None = setting(None, "what the ratio is of; None, here and below: the variant's own", LEVEL)
    clip: str | None = setting(None, 'where the ratio has moved far', one_of('clip', 'cispo', 'dppo'))
    clip_low: float | None = setting(None, 'how far down', FROM_0)
    clip_high: float | None = setting(None, 'how far up', FROM_0)
    aggregation: str | None = setting(
        None, 'the divisor of the sum over tokens', one_of('tokens', 'constant', 'response')
    )
    kl: str | None = setting(
        None, 'the leash: k1 in the reward; k3, or all of the vocabulary, as a loss', one_of(*LEASHES)
    )
    beta: float | None = setting(None, 'coefficient of the leash', FROM_0)
    truncated: str | None = setting(None, 'of one without end of turn; penalty: −1 in place of its score', TRUNCATED)
    resample: int | None = setting(None, 'times that groups whose scores do not differ are drawn anew', up_to(100))
    kl_target: float | None = setting(None, 'nats a response that beta is moved towards; None: it stays', POSITIVE)
    kl_budget: float | None = setting(None, 'nats a response off the reference that end the run; None: none', POSITIVE)
    mismatch: str = setting('none', 'where the sampler is not quite the trainer', one_of('none', 'truncate', 'mask'))
    mismatch_ratio: str = setting('token', 'of what is compared there', LEVEL)


ADVANTAGES = ('group', 'group_std', 'rloo', 'batch_std', 'max_rl', 'reinforce++')
# The family of GRPO, by what its papers choose. What stands between is that of the first, which is what is agreed on by
# the end of 2026: nothing divides by a group's std or a response's length, and a verifier needs no leash.
_OURS = {
    'advantage': 'group', 'rl.ratio': 'token', 'rl.clip': 'clip', 'rl.clip_low': 0.2, 'rl.clip_high': 0.28,
    'rl.aggregation': 'tokens', 'rl.kl': 'none', 'rl.beta': 0.0, 'rl.truncated': 'score', 'rl.resample': 0,
}  # fmt: skip
_SYMMETRIC = {'rl.clip_high': 0.2}
VARIANTS: dict[str, dict[str, Any]] = {
    'default': _OURS,
    # Shao et al., 2024, eq. 3 and 4. Its k3 has no importance ratio; ours does (arXiv 2512.02556).
    'grpo': _OURS
    | _SYMMETRIC
    | {'advantage': 'group_std', 'rl.aggregation': 'response', 'rl.kl': 'k3', 'rl.beta': 0.04},
    # Liu et al., 2025 (arXiv 2503.20783), section 3.2: neither std nor length.
    'dr_grpo': _OURS | _SYMMETRIC | {'rl.aggregation': 'constant'},
    # Yu et al., 2025 (arXiv 2503.14476), eq. 8 to 13: clip-higher, drawing anew, loss by tokens, a rising penalty.
    'dapo': _OURS | {'advantage': 'group_std', 'rl.truncated': 'rising', 'rl.resample': 3},
    # Ahmadian et al., 2024, eq. 6 to 9: the mean of the others; KL in the reward; sums over whole responses.
    'rloo': _OURS
    | _SYMMETRIC
    | {'advantage': 'rloo', 'rl.aggregation': 'constant', 'rl.kl': 'reward', 'rl.beta': 0.05},
    # Zheng et al., 2025 (arXiv 2507.18071), eq. 5 to 7 and section 5.1.
    'gspo': _OURS
    | {
        'advantage': 'group_std', 'rl.ratio': 'sequence', 'rl.aggregation': 'response', 'rl.clip_low': 3e-4,
        'rl.clip_high': 4e-4,
    },
    # MiniMax, 2025 (arXiv 2506.13585), eq. 4 and 5; the bound as in ScaleRL (arXiv 2510.13786).
    'cispo': _OURS | {'advantage': 'group_std', 'rl.clip': 'cispo', 'rl.clip_high': 5.0},
    # Hu, 2025 (arXiv 2501.03262): no group, the whole batch's mean and std; KL in the reward.
    'reinforce++': _OURS | _SYMMETRIC | {'advantage': 'reinforce++', 'rl.kl': 'reward', 'rl.beta': 0.01},
    # arXiv 2602.02710: r/mean − 1, the gradient of a truncated series of the log of the success rate.
    'maxrl': _OURS | {'advantage': 'max_rl'},
}  # fmt: skip


# Of PPO, by its published details (Huang et al., 2024): k1 in the reward, −1 for a response that does not end.
PPO = _OURS | _SYMMETRIC | {'rl.kl': 'reward', 'rl.beta': 0.025, 'rl.truncated': 'penalty'}
CLIP_HIGH = {'cispo': 5.0, 'dppo': 0.2}  # in place of `clip`'s, where a clip is named and nothing is said of how far


@dataclass(frozen=True)
class Online(Settings):
    """The settings of all stages that learn from what their policy draws."""

    stage: str = setting('grpo', 'of lm.stages')
    data: DialogueData = DialogueData()
    lora: Lora = Lora()
    rl: Rl = Rl()
    reward: RewardSource = RewardSource()
    reward_from: str | None = setting(None, 'DIR[@STEP] of a reward model; the critic of PPO starts from it, too')


@dataclass(frozen=True)
class Grpo(Online):
    variant: str = setting('default', 'of VARIANTS: sets what is None of advantage and rl', one_of(*VARIANTS))
    advantage: str | None = setting(None, "of lm.advantages; None: the variant's own", one_of(*ADVANTAGES))


@dataclass(frozen=True)
class Critic:
    """The critic of PPO."""

    rate: float = setting(2.0, 'its learning rate, as a multiple of optim.lr', POSITIVE)
    warmup: int = setting(6, 'rollouts from which the critic alone learns', COUNT_OR_0)
    clip: float = setting(2.0, 'how far a value may move on one rollout, in deviations of rewards', POSITIVE)
    lam: float = setting(1.0, 'λ of GAE for its targets', PART)


@dataclass(frozen=True)
class Ppo(Online):
    stage: str = setting('ppo', 'of lm.stages')
    rl: Rl = Rl(prompts=256, group=1, epochs=2, kl_budget=20.0)
    critic: Critic = Critic()
    lam: float | None = setting(None, "λ of GAE for the policy's advantages; None: by length, at least .95", PART)


# ---- jobs ----

KEEP = ('best_of_n', 'rejection')


@dataclass(frozen=True)
class PromptData(Data):
    strict: bool = setting(False, 'a malformed record ends the job with a line that names it; else it is left out')


@dataclass(frozen=True)
class Generate(Shared):
    """Answers that a run draws to prompts, of which those of the highest score are kept."""

    stage: str = setting('generate', 'of lm.jobs')
    data: PromptData = PromptData()
    reward: RewardSource = RewardSource()
    reward_from: str | None = setting(None, 'DIR[@STEP] of a reward model')
    prompts: int = setting(256, 'prompts of the mixture, or all that there are if these are fewer', COUNT)
    n: int = setting(8, 'answers to each prompt', COUNT)
    keep: str = setting('best_of_n', 'the best answer of each prompt, or all of a score from threshold', one_of(*KEEP))
    threshold: float | None = setting(None, 'keep=rejection: the least score of an answer that is kept')
    temperature: float = setting(1.0, 'of the draws', POSITIVE)
    max_new_tokens: int = setting(64, 'of an answer; one without an end is not kept', up_to(MAX_NEW_TOKENS, 1))
    batch_size: int = setting(64, 'answers drawn at once, a multiple of n', COUNT)
