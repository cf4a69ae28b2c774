-- Changes a value, if it is still one of those that the caller knows.
--
-- KEYS: the key. ARGV: the new value, the values that it may replace. Returns 1 if it did, else 0.

local now = redis.call('GET', KEYS[1])
for known = 2, #ARGV do
  if now == ARGV[known] then
    redis.call('SET', KEYS[1], ARGV[1])
    return {1}
  end
end
return {0}
