"""HunyuanVideo's parameters on a mesh: Megatron-style tensor parallelism. Torch weights are [out, in]; biases [out]."""

BLOCK = r"transformer_blocks\.\*\."

TRANSFORMER = (
    (BLOCK + r"attn\.(to_[qkv]|add_[qkv]_proj)\.weight", ("tp", None)),
    (BLOCK + r"attn\.(to_[qkv]|add_[qkv]_proj)\.bias", ("tp",)),
    (BLOCK + r"attn\.(to_out\.0|to_add_out)\.weight", (None, "tp")),
    (BLOCK + r"(ff|ff_context)\.net\.0\.proj\.weight", ("tp", None)),
    (BLOCK + r"(ff|ff_context)\.net\.0\.proj\.bias", ("tp",)),
    (BLOCK + r"(ff|ff_context)\.net\.2\.weight", (None, "tp")),
)

QWEN = (
    (r"embed_tokens\.weight", ("tp", None)),
    (r"layers\.\*\.self_attn\.[qkv]_proj\.weight", ("tp", None)),
    (r"layers\.\*\.self_attn\.[qkv]_proj\.bias", ("tp",)),
    (r"layers\.\*\.self_attn\.o_proj\.weight", (None, "tp")),
    (r"layers\.\*\.mlp\.(gate|up)_proj\.weight", ("tp", None)),
    (r"layers\.\*\.mlp\.down_proj\.weight", (None, "tp")),
)
