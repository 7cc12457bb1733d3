"""Protocol buffers: the generated messages, and the strict decoder that reads them."""
