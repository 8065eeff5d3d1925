"""CogVideoX's parameters on a mesh: Megatron-style tensor parallelism. Torch weights are [out, in]; biases [out]."""

TRANSFORMER = (
    (r"transformer_blocks\.\*\.attn1\.to_[qkv]\.weight", ("tp", None)),
    (r"transformer_blocks\.\*\.attn1\.to_[qkv]\.bias", ("tp",)),
    (r"transformer_blocks\.\*\.attn1\.to_out\.0\.weight", (None, "tp")),
    (r"transformer_blocks\.\*\.ff\.net\.0\.proj\.weight", ("tp", None)),
    (r"transformer_blocks\.\*\.ff\.net\.0\.proj\.bias", ("tp",)),
    (r"transformer_blocks\.\*\.ff\.net\.2\.weight", (None, "tp")),
)
