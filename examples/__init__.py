"""Programs that show the library at work, and the parts they share."""
