"""DeltaFormer: the formulas token by token, and plain attention where nothing is erased."""

from __future__ import annotations

import torch

from hybridlm.model.mixers import AttentionConfig, DeltaFormerConfig, build_mixer
from hybridlm.model.rope import rotate
from hybridlm.model.sequence import SequenceInfo
from tests.support.mixer_cases import build, context_of, inputs, run

T, K = 9, 8


def test_the_formula_of_the_paper():
    mixer, x = build("deltaformer"), inputs(1, T)[0]
    seq = SequenceInfo.make(1, T, x.device)
    with torch.no_grad():
        q, k = (rotate(norm(proj(x).unflatten(-1, (-1, K)))[None], mixer.config.rope, K, seq)[0]
                for proj, norm in ((mixer.q_proj, mixer.q_norm), (mixer.k_proj, mixer.k_norm)))
        v, beta = mixer.v_proj(x).unflatten(-1, (-1, K)), mixer.beta_proj(x)
        outputs = []
        for h in range(4):
            u, column = [v[0, h // 2]], []
            for t in range(T):
                scores = k[: t + 1, h // 2] @ q[t, h] / K**0.5
                if t:
                    u.append(v[t, h // 2] - beta[t, h] * scores[:t].softmax(0) @ torch.stack(u))
                column.append(scores.softmax(0) @ torch.stack(u))
            outputs.append(torch.stack(column))
        torch.testing.assert_close(run(mixer, x[None])[0], mixer.o_proj(torch.cat(outputs, -1)))


def test_without_erasing_it_is_attention_and_it_starts_near_it():
    torch.manual_seed(0)
    mixer = build_mixer(DeltaFormerConfig(num_heads=4, num_kv_heads=2, head_dim=8), context_of())
    plain = build_mixer(AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8), context_of())
    mixer.init_weights(0.2)
    assert torch.equal(mixer.beta_proj.bias, torch.zeros(4))
    plain.load_state_dict({name: value for name, value in mixer.state_dict().items() if "beta" not in name})
    torch.nn.init.zeros_(mixer.beta_proj.weight)
    x = inputs(2, 30, torch.float32)
    torch.testing.assert_close(run(mixer, x), run(plain, x), rtol=1e-5, atol=1e-6)
