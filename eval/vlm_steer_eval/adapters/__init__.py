"""Steered models in other evaluation harnesses. Each module needs the harness it is named after."""
