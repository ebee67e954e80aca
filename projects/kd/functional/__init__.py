"""The methods' mathematics as pure functions, one file a method."""
