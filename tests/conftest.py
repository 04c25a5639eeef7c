"""Settings that must hold before torch and transformers are imported."""

import os

# Two OpenMP threads that spin on a busy machine can make torch thirty times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
