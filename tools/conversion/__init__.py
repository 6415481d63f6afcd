"""What tools/hf_to_nemo.py and tools/nemo_to_hf.py are made of; both directions read the same tables.

configs.py       Hugging Face's config.json <-> NeMo's model section
mapping.py       which Hugging Face tensors make up which of Megatron's, and how
huggingface.py   safetensors directories, a tensor at a time
shards.py        Megatron's distributed checkpoint, a tensor at a time
archive.py       a .nemo, packed or as a directory
tokenizers.py    the tokenizer with its chat template
"""
