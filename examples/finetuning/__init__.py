"""Parts of ``examples/finetune.py``."""
