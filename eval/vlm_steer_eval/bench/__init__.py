"""What steering costs: whole generations, and single layers."""
