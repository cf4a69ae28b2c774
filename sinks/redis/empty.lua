-- Deletes every key that begins with one of ours, in one moment.
--
-- ARGV: the prefixes. Returns how many keys there were.
--
-- One script, because a replicator may be writing: between two steps it would count an event whose seen bit, or mark
-- one whose count, is then deleted. Redis serves nobody else meanwhile, some 1 µs for each of its keys.

local cursor, deleted = '0', 0
repeat
  local page = redis.call('SCAN', cursor, 'COUNT', 1000)
  cursor = page[1]
  for _, key in ipairs(page[2]) do
    for _, prefix in ipairs(ARGV) do
      if string.sub(key, 1, #prefix) == prefix then
        deleted = deleted + redis.call('UNLINK', key)
        break
      end
    end
  end
until cursor == '0'
return {deleted}
