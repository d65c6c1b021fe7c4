"""Checkpoints on disk: lazy reading, names against state dict paths, and crash-safe writing.

reader: `CheckpointReader`, `RawTensor`. names: `NameMap`. writer: `CheckpointWriter`, `write_safetensors`.
hub: `resolve_model`. Modules are imported one by one: only `names` needs Transformers, which takes seconds to load.
"""
