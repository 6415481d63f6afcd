"""From the text of an answer to its reward. Models load on construction, never on import."""
