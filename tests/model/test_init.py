"""Initialisation writes every parameter and buffer, or says which one nobody writes."""

import pytest
import torch
from torch import nn

from hybridlm.model import build_model
from hybridlm.model.init import InitialisationError, init_weights
from hybridlm.model.model import HybridLM
from tests.support.tiny_lm import config


def with_extra(extra, layer=1):
    """A model on "meta" whose mixer of one layer has been given something more by `extra`."""
    with torch.device("meta"):
        lm = HybridLM(config())
        extra(lm.layers[layer].mixer)
    return lm


def add_parameter(mixer):
    mixer.gain = nn.Parameter(torch.ones(3))


def add_table(mixer):
    mixer.register_buffer("table", torch.arange(4), persistent=False)


def add_mask(mixer):
    mixer.register_buffer("mask", torch.zeros(2, dtype=torch.bool), persistent=False)


@pytest.mark.parametrize(("extra", "name"), [(add_parameter, "gain"), (add_table, "table"), (add_mask, "mask")])
@pytest.mark.parametrize("on_meta", [True, False])
def test_what_a_mixer_leaves_without_a_value_is_named(extra, name, on_meta):
    if on_meta:
        lm, device = with_extra(extra), "cpu"
    else:
        lm, device = build_model(config()), None
        extra(lm.layers[1].mixer)
    with pytest.raises(InitialisationError, match=rf"DeltaRule\.init_weights leaves 'layers\.1\.mixer\.{name}' w"):
        init_weights(lm, 0.02, 0, device)


def test_a_parameter_that_belongs_to_no_kind_is_named():
    lm = build_model(config())
    lm.layers[0].scale = nn.Parameter(torch.ones(3))
    with pytest.raises(InitialisationError, match=r"nothing initialises 'layers\.0\.scale' of Block"):
        lm.init_weights()


@pytest.mark.parametrize("how", ["in place", "through data", "a new tensor"])
def test_every_way_of_writing_counts(how, monkeypatch):
    lm = with_extra(add_table)
    mixer = lm.layers[1].mixer
    initialise = type(mixer).init_weights

    def init(self, std):
        initialise(self, std)
        if self is mixer and how == "in place":
            self.table.fill_(7)
        elif self is mixer and how == "through data":
            self.table.data.fill_(7)
        elif self is mixer:
            self.table = torch.full((4,), 7)

    monkeypatch.setattr(type(mixer), "init_weights", init)
    init_weights(lm, 0.1, 0, "cpu")
    assert mixer.table.tolist() == [7] * 4
    for name, parameter in build_model(config(), seed=0).named_parameters():
        assert torch.equal(parameter, lm.get_parameter(name)), name


def test_weights_can_be_made_under_inference_mode():
    with torch.inference_mode():
        lm = HybridLM(config())
    assert torch.equal(lm.embed.weight, build_model(config(), seed=0).embed.weight)
