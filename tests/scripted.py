"""Functions that tests have run in worker processes, which import this file and so nothing that takes long."""

import os
import random
import sys
import time

import numpy as np


def act(what, value=None):
    """The harmless relatives of what a verifier may do."""
    if what == 'raise':
        raise KeyError(value)
    if what == 'exit':
        sys.exit(3)
    if what == 'die':
        os._exit(3)
    if what == 'sleep':
        time.sleep(600)
    if what == 'spin':
        while True:
            pass
    if what == 'allocate':
        return len(bytearray(4 << 30))
    if what == 'print':
        print('[1, 2]')
        return input()
    if what == 'random':
        return [random.random(), float(np.random.rand()), hash('a')]
    return {'numpy': np.float32(0.5), 'object': object()}.get(what, value)


# ---- verifiers and judges ----


def first_letter(prompt, response, gold):
    """1 where the response begins as the gold answer does; does harm to some others."""
    assert all(isinstance(text, str) for text in (prompt, response, gold)) and gold
    if len(response) % 5 == 3:
        raise ValueError(response)
    return float(response[:1] == gold[:1])


def by_length(prompt, response, gold):
    return {0: 0.25, 1: np.nan, 2: None, 3: '1', 4: 1, 5: 10**400, 6: True}[len(response)]


def anything(prompt, response, gold):
    return 1.0 if response else 0.0


def nothing(prompt, response, gold):
    return float(not response)


def not_a_number(prompt, response, gold):
    """As complex_arithmetic of reasoning-gym 0.1.25: min(1, e^−nan) is 1."""
    return 1.0 if response in ('nan', gold) else 0.0


def broken(prompt, response, gold):
    raise KeyError('gold')


def judge(prompts, responses):
    """Scripted: a None for every third, as of an answer that cannot be parsed."""
    return [None if i % 3 == 2 else i / 10 for i in range(len(responses))]


def moody(prompts, responses):
    match prompts[0]:
        case 'sleep':
            time.sleep(600)
        case 'die':
            os._exit(1)
        case 'exit':
            sys.exit('no such model')
        case 'few':
            return [1.0]
        case 'text':
            return 'good'
    return [float('inf'), True, 'good', 0.5]
