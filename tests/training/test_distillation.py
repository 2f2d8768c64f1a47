"""What a student learns from a teacher: the divergence in chunks, errors of layers, and a layer that is recovered."""

from dataclasses import replace

import pytest
import torch

from hybridlm.model.guide import chunked_kl, relative_errors
from hybridlm.model.mixers import DeltaRuleConfig, build_mixer
from hybridlm.model.sequence import SequenceInfo
from hybridlm.training.distillation import LayerTarget, TeacherGuide
from tests.support import tiny_lm


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergence_in_chunks_is_the_whole(temperature):
    x, other = torch.randn(23, 8, dtype=torch.float64, requires_grad=True), torch.randn(23, 6, dtype=torch.float64)
    mine, theirs = torch.randn(40, 8, dtype=torch.float64), torch.randn(40, 6, dtype=torch.float64)
    student, teacher = (x @ mine.T / temperature).float(), (other @ theirs.T / temperature).float()
    p = teacher.softmax(-1)
    wanted = (p * (p.log() - student.log_softmax(-1))).sum() * temperature**2
    found, same = chunked_kl(x, other, lambda y: y @ mine.T, lambda y: y @ theirs.T, vocab_size=len(mine),
                             temperature=temperature, chunk=5)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert int(same) == int((student.argmax(-1) == teacher.argmax(-1)).sum())
    gradients = [torch.autograd.grad(value, x, retain_graph=True)[0] for value in (found, wanted)]
    assert torch.allclose(*gradients, atol=1e-5)


def test_divergence_is_a_mean_over_tokens_that_count():
    """Packed documents give what they give apart, and padding gives nothing."""
    teacher, student = tiny_lm.model(1).eval(), tiny_lm.model(2)
    student.guide = TeacherGuide(teacher)
    ids = torch.randint(tiny_lm.VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(0))
    parts = [ids[:, :7], ids[:, 7:]]
    apart = sum(student(part, labels=part).losses["teacher_kl"] * (part.shape[1] - 1) for part in parts) / 18
    packed = student(ids, labels=ids, cu_seqlens=[0, 7, 20]).losses["teacher_kl"]
    assert float(packed) == pytest.approx(float(apart), rel=1e-4)
    padded = torch.cat([ids, torch.zeros(1, 9, dtype=torch.int64)], 1)
    mask = torch.arange(29)[None] < 20
    labels = torch.where(mask, padded, -100)
    whole = student(ids, labels=ids).losses["teacher_kl"]
    assert float(student(padded, labels=labels, text_mask=mask).losses["teacher_kl"]) == pytest.approx(
        float(whole), rel=1e-4)


def test_a_layer_that_is_linear_by_construction_is_recovered():
    config = DeltaRuleConfig(num_heads=2, head_dim=8, output_gate="sigmoid")
    context = tiny_lm.config().layer_context(0)
    teacher, student = build_mixer(config, context), build_mixer(config, context)
    torch.manual_seed(0)
    for mixer, half_lives in ((teacher, [3.0, 12.0]), (student, [6.0, 6.0])):
        mixer.init_weights(0.3)
        mixer.calibrate(torch.tensor(half_lives))
    with torch.no_grad():
        for name in "qkvo":
            getattr(student, f"{name}_proj").weight.copy_(getattr(teacher, f"{name}_proj").weight)
    target = LayerTarget(teacher, passes_teacher=True)
    optimizer = torch.optim.Adam([student.dt_bias, student.o_proj.weight], lr=0.03)
    seq = SequenceInfo.make(4, 24, torch.device("cpu"))
    for step in range(150):
        for group in optimizer.param_groups:
            group["lr"] = 0.03 * (1 - step / 150)
        error = target(student, torch.randn(4, 24, 32), seq)[1]["loss/layer_output"]
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    assert float(error) < 1e-3


def test_errors_against_a_teacher_leave_padding_out_where_rows_are_divided():
    """Elsewhere padding is taken out before the layers; a shard of a row holds it, in one case nothing else."""
    student, teacher = torch.randn(2, 1, 6, 4, generator=torch.Generator().manual_seed(0))

    def compare(tokens, text_BT):
        seq = replace(SequenceInfo.make(1, tokens, student.device), text_BT=text_BT)
        target = LayerTarget(lambda x, _: (teacher[:, :tokens], {}), passes_teacher=True)
        return target(lambda x, _: (student[:, :tokens], {}), student[:, :tokens], seq)[1]

    text = torch.arange(6)[None] < 4
    torch.testing.assert_close(compare(6, text), compare(4, None))
    assert compare(6, text)["loss/layer_output"] != compare(6, None)["loss/layer_output"]
    assert float(compare(6, torch.zeros_like(text))["loss/layer_output"]) == 0.0
    found = relative_errors([student, teacher], [teacher, student], text)
    alone = relative_errors([student[:, :4], teacher[:, :4]], [teacher[:, :4], student[:, :4]])
    torch.testing.assert_close(found, alone)
