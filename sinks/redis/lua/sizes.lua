-- How large buckets are.
--
-- KEYS: the logs of some buckets; after these their sorted sets. Returns the number of bytes of each log; after these
-- the number of members of each sorted set.

local sizes = {}
for i, key in ipairs(KEYS) do
  sizes[i] = redis.call(i <= #KEYS / 2 and 'STRLEN' or 'ZCARD', key)
end
return sizes
