"""What the commands of ``vlm-steer`` do, and the options they share."""
