"""What a shell offers at TAB: found from the source, so that nothing heavy is imported."""
