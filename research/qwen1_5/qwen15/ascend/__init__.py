"""The Ascend path examined on a card: plain definitions of its operators, and the report."""
