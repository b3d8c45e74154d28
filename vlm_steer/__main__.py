"""``python -m vlm_steer`` is the ``vlm-steer`` command."""

from vlm_steer.cli import main

if __name__ == "__main__":
    main()
