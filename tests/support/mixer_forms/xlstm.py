"""Forms of mLSTM and sLSTM."""

from hybridlm.model.mixers import MLSTMBlockConfig, MLSTMConfig, SLSTMConfig
from hybridlm.model.mixers.contract import MixerConfig

FORMS: dict[str, MixerConfig] = {
    "mlstm": MLSTMConfig(num_heads=2, head_dim=4),
    "mlstm_block": MLSTMBlockConfig(num_heads=2, expand=1.0),
    "slstm": SLSTMConfig(num_heads=4),
}
FP32 = {"i_bias", "f_bias", "skip", "gate_bias"}
OTHER_STARTS = {"i_proj.weight", "f_proj.weight"}
NO_MATRICES = {"conv.weight"}
