"""Wan's parameters on a mesh: Megatron-style tensor parallelism. Torch weights are [out, in]; biases [out]."""

TRANSFORMER = (
    (r"blocks\.\*\.attn[12]\.to_[qkv]\.weight", ("tp", None)),
    (r"blocks\.\*\.attn[12]\.to_[qkv]\.bias", ("tp",)),
    (r"blocks\.\*\.attn[12]\.to_out\.0\.weight", (None, "tp")),
    (r"blocks\.\*\.ffn\.net\.0\.proj\.weight", ("tp", None)),
    (r"blocks\.\*\.ffn\.net\.0\.proj\.bias", ("tp",)),
    (r"blocks\.\*\.ffn\.net\.2\.weight", (None, "tp")),
    (r"condition_embedder\.(time|text)_embedder\.linear_1\.weight", ("tp", None)),
    (r"condition_embedder\.(time|text)_embedder\.linear_1\.bias", ("tp",)),
    (r"condition_embedder\.(time|text)_embedder\.linear_2\.weight", (None, "tp")),
)
