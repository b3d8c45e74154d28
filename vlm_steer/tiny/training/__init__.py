"""How the embedded model is trained from scratch; run ``python -m vlm_steer.tiny.train``."""
