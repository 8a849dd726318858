"""loaderd side by side with what people would pick instead, each over its own protocol."""
