"""scratch"""
import time
import pytest
from running import lines, measured

def test_all(dialogues, tmp_path):
    for stage, opts in (('sft', {}), ('reward', {}), ('dpo', {}), ('dpo', {'reference': 'live'}), ('dpo', {'loss': 'kto'}), ('dpo', {'loss': 'simpo'})):
        dialogues.parent(stage)
        t = time.time()
        print(stage, opts, dialogues.train(stage, tmp_path / f'{stage}{len(opts)}{opts}', **opts))
        print('SECONDS', time.time() - t)
        print({k: v for k, v in measured(tmp_path / f'{stage}{len(opts)}{opts}').items() if k[0] == 1})
