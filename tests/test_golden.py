"""The loss curve of each stage's tiny run, as it was when somebody last looked at it: a refactor leaves it alone."""

import pytest
from running import measured

ADAMW = {
    (1, 'train/loss'): 5.99248,
    (1, 'train/grad_norm'): 3.19109,
    (4, 'train/loss'): 5.37825,
    (8, 'train/loss'): 4.68065,
    (12, 'train/loss'): 4.46846,
    (12, 'train/grad_norm'): 1.73590,
    (12, 'eval/one.jsonl/bpb'): 5.30469,
    (12, 'eval/two.jsonl/bpb'): 5.12384,
}
MUON = {
    (1, 'train/loss'): 5.99248,
    (1, 'train/grad_norm'): 3.19109,
    (4, 'train/loss'): 5.91074,
    (8, 'train/loss'): 5.38114,
    (12, 'train/loss'): 5.26243,
    (12, 'train/grad_norm'): 2.71815,
    (12, 'eval/one.jsonl/bpb'): 6.25905,
    (12, 'eval/two.jsonl/bpb'): 6.04239,
}
SFT = {
    (1, 'train/loss'): 5.26878,
    (1, 'train/grad_norm'): 2.49614,
    (3, 'train/loss'): 4.88680,
    (6, 'train/loss'): 4.50394,
    (6, 'eval/chats.jsonl/response_loss'): 4.30090,
    (6, 'eval/one.jsonl/bpb'): 5.28699,
}
REWARD = {
    (1, 'train/loss'): 0.56957,
    (1, 'train/grad_norm'): 3.31820,
    (1, 'train/centring'): 4.15716,
    (3, 'train/loss'): 0.71215,
    (6, 'train/loss'): 0.44844,
    (6, 'eval/reward_std'): 0.73356,
    (6, 'eval/pairs.jsonl/log_loss'): 0.68518,
}
DPO = {
    (1, 'train/loss'): 1.11837,
    (1, 'train/grad_norm'): 2.04587,
    (3, 'train/loss'): 1.01194,
    (6, 'train/loss'): 0.86594,
    (6, 'train/chosen_nll'): 4.31458,
    (6, 'eval/pairs.jsonl/chosen_loss'): 4.60996,
    (6, 'eval/one.jsonl/bpb'): 5.35249,
}
TOLERANCE = 1e-4  # relative; JAX 0.10 and 0.12 differ by 2e-6


def assert_golden(workdir, golden):
    found = measured(workdir)
    found = {key: found[key] for key in golden}
    assert found == pytest.approx(golden, rel=TOLERANCE), (
        'the curve moved. If the mathematics was meant to change (initialisation, optimizer, loss, packing, order of '
        f'the data), show the curves before and after and store this one: {found}; else find out what moved it'
    )


@pytest.mark.parametrize(
    ('optimizer', 'golden'),
    [pytest.param('adamw', ADAMW, marks=pytest.mark.slow), ('muon', MUON)],
    ids=['adamw', 'muon'],
)
def test_pretraining_learns_as_it_did(lab, tmp_path, monkeypatch, optimizer, golden):
    monkeypatch.chdir(lab.folder)  # a source's name, here relative, is part of what orders its rows
    lab.train(tmp_path / 'run', data__mixture='one.jsonl:0.7,two.jsonl:0.3', optim__name=optimizer)
    assert_golden(tmp_path / 'run', golden)


@pytest.mark.parametrize(
    ('stage', 'golden'), [('sft', SFT), ('reward', REWARD), ('dpo', DPO)], ids=['sft', 'reward', 'dpo']
)
def test_a_stage_after_it_learns_as_it_did(dialogues, stage, golden):
    assert_golden(dialogues.run(stage), golden)
