"""Choose the options of a steering on data of their own, and confirm the choice on other data."""
