-- Makes the window of its buckets.
--
-- KEYS: the window, its buckets. ARGV: seconds to keep it. Returns how many keys are in it.

local size = redis.call('ZUNIONSTORE', KEYS[1], #KEYS - 1, unpack(KEYS, 2))
if size > 0 then
  redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', 0)
  redis.call('EXPIRE', KEYS[1], ARGV[1])
end
return {size}
