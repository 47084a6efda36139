"""What context parallel sends, against ring attention."""
