"""Forms of layers that look tokens up in tables."""

from hybridlm.model.mixers import EngramConfig, PerLayerEmbeddingConfig
from hybridlm.model.mixers.contract import MixerConfig

FORMS: dict[str, MixerConfig] = {
    "per_layer_embedding": PerLayerEmbeddingConfig(embed_dim=6),
    "engram": EngramConfig(heads_per_ngram=2),
    "engram_of_pairs": EngramConfig(max_ngram=2, heads_per_ngram=3, table_rows=17, embed_dim=9, conv_size=2,
                                    pad_token=5),
}
