"""Published model shapes that several tests calculate with."""

from __future__ import annotations

from rlkit.recover.source import ModelShape

_LLAMA, _QWEN = "LlamaForCausalLM", "Qwen3ForCausalLM"

LLAMA2_7B = ModelShape(_LLAMA, 32, 4096, 11008, 32, 32, 128, 32000, False, 4096, False)
LLAMA31_8B = ModelShape(_LLAMA, 32, 4096, 14336, 32, 8, 128, 128256, False, 131072, False)
QWEN3_4B = ModelShape(_QWEN, 36, 2560, 9728, 32, 8, 128, 151936, True, 40960, True)
QWEN3_8B = ModelShape(_QWEN, 36, 4096, 12288, 32, 8, 128, 151936, False, 40960, True)
SMOLLM2_135M = ModelShape(_LLAMA, 30, 576, 1536, 9, 3, 64, 49152, True, 8192, False)
FOUR = (LLAMA2_7B, LLAMA31_8B, QWEN3_4B, QWEN3_8B)
