"""What stands in the tables already: pages of events, the SQL that reads them, and the moment that they are as of."""
