"""Checks before any weight is used: file types, configs, vocabularies, buffers, unpaired tensors.

The rule for all of `checkpoints`: every tensor, key, config field and file of an input is used, copied with a message, or
refused by name. Nothing passes unread. Responsible modules:

files           local/checkpoint.py (which files make a checkpoint), checks/impostors.py (what they are), lora/config.py (adapter or
                model), sidefiles.py (what is copied beside weights)
tensors         pairing.py and checks/unpaired.py (partners, and tensors without one), names/ (names and forms of other versions),
                checks/buffers.py, checks/usable.py (husks), quantized/layout.py (codes and their companions), header.py (names, bounds)
adapter keys    lora/keys.py (sorted, or refused as unknown), lora/fit.py (where they belong), lora/alpha.py (records of the scale)
config fields   checks/configs.py (of models), lora/config.py (of adapters: an unknown field is refused), lora/tied.py
tokens          checks/vocabulary.py

A new form of input gets a line here and in docs/inputs.md, a trait in benchmarks/fuzz, and a test with the right values."""
