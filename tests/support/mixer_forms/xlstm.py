"""Forms of mLSTM."""

from hybridlm.model.mixers import MLSTMBlockConfig, MLSTMConfig
from hybridlm.model.mixers.contract import MixerConfig

FORMS: dict[str, MixerConfig] = {
    "mlstm": MLSTMConfig(num_heads=2, head_dim=4),
    "mlstm_block": MLSTMBlockConfig(num_heads=2, expand=1.0),
}
FP32 = {"i_bias", "f_bias", "skip"}
OTHER_STARTS = {"i_proj.weight", "f_proj.weight"}
NO_MATRICES = {"conv.weight"}
