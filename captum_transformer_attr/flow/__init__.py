"""What aggregates attention records into token scores."""
