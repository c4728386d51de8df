"""Pretraining on real text."""


from lm import config, presets


def get_config(arg: str = "") -> config.Config:
    c = config.base()
    c.steps = 500
    c.data.mixture = 'botocore:0.7,chitchat:0.3'
    return presets.apply(c, arg)
