"""Sources -> tokens on disk -> packed batches with document borders. See docs/data.md."""

from hybridlm.data.packing import Batch, PackedDataset, Sample, collate
from hybridlm.data.prepare import DATA_RULES, PreparedData, check_sources, prepare, train_tokenizer
from hybridlm.data.shards import TokenStore
from hybridlm.data.statistics import bigram_entropy, unigram_entropy
from hybridlm.data.tokenizer import StreamDecoder, Tokenizer, check_vocab, load_tokenizer
from hybridlm.data.tokenizer_comparison import tokenizer_differences

__all__ = ["DATA_RULES", "Batch", "PackedDataset", "PreparedData", "Sample", "StreamDecoder", "TokenStore", "Tokenizer",
           "bigram_entropy", "check_sources", "check_vocab", "collate", "load_tokenizer", "prepare",
           "tokenizer_differences", "train_tokenizer", "unigram_entropy"]
