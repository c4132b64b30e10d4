"""What a person touches: commands, configuration, console."""
