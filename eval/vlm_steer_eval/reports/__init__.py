"""Reports for people: tables, galleries and self-contained HTML."""
