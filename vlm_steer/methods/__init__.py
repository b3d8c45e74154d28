"""One file per intervention. A method here is found by itself; there is no list to edit."""
