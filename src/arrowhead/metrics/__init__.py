"""How far two outputs are apart: `error` for tensors inside a search, `images` for what a person sees."""
