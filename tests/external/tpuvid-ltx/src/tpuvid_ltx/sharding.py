"""LTX-Video's parameters on a mesh: Megatron-style tensor parallelism. Torch weights are [out, in]; biases [out]."""

TRANSFORMER = (
    (r"transformer_blocks\.\*\.(attn[12]\.to_[qkv]|ff\.net\.0\.proj)\.weight", ("tp", None)),
    (r"transformer_blocks\.\*\.(attn[12]\.to_[qkv]|ff\.net\.0\.proj)\.bias", ("tp",)),
    (r"transformer_blocks\.\*\.(attn[12]\.to_out\.0|ff\.net\.2)\.weight", (None, "tp")),
)
