"""From the rows of the slot to events: the enricher of one stream, its dimensions' contents, and several streams."""
