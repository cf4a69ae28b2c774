-- Writes a batch: counts each event once, however often it comes, and keeps each content's newest event. The same event
-- again replaces itself: its content may have been corrected.
--
-- KEYS: the window, its state; then for each page its seen bits; for each bucket its sorted set; for each bucket its
--       log; for each content its count, after these its newest moment, after these its last event.
-- ARGV: how many pages; how many buckets; seconds to keep a last event; the events, as little-endian uint16s: for each
--       run of events of one page and one bucket (0: none) page, bucket and how many, then for each event bit and
--       content; the contents, as little-endian int64s; then for each bucket the seconds to keep its log; for each
--       content the moment of its newest event; for each content that event.
-- Returns how many of the events are new.
--
-- It ranks nothing: that takes several times as long as the rest where there are many contents. It logs what is new:
-- for each content of a bucket an int64, the content, and a uint32, how many. `window.py` sums that up.
--
-- All reads come first, so that another program's key is an error before anything has changed. Redis refuses a script
-- that it has no memory or disk for at its first write, and we use every right before we count. So a batch is counted
-- whole or not at all.

local N_PAGES, N_BUCKETS, KEEP_LAST = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3]
local EVENTS, CONTENTS = ARGV[4], ARGV[5]
local N_CONTENTS = #CONTENTS / 8
local MOMENT_WIDTH = 38 -- of (event_ts, event_id); the commit's LSN follows
local SLICE = 1500 -- Lua passes at most some 8,000 arguments to a command
local MASKS = {[0] = 128, 64, 32, 16, 8, 4, 2, 1}
local char, byte, sub, packed, unpacked = string.char, string.byte, string.sub, struct.pack, struct.unpack

-- KEYS and ARGV after these are the first page's, the first bucket's ...
local PAGE, BUCKET = 2, 2 + N_PAGES
local LOG = BUCKET + N_BUCKETS
local COUNT = LOG + N_BUCKETS
local NEWEST = COUNT + N_CONTENTS
local LAST = NEWEST + N_CONTENTS
local KEEP_LOG, MOMENT = 5, 5 + N_BUCKETS
local EVENT = MOMENT + N_CONTENTS

local function values(after)
  local found = {}
  for from = 1, N_CONTENTS, SLICE do
    local to = math.min(from + SLICE - 1, N_CONTENTS)
    for i, value in ipairs(redis.call('MGET', unpack(KEYS, after + from, after + to))) do
      found[from + i - 1] = value
      if not value then
        redis.call('STRLEN', KEYS[after + from + i - 1]) -- MGET says nothing of a key of another type
      end
    end
  end
  return found
end

local function set(pairs)
  for from = 1, #pairs, 2 * SLICE do
    redis.call('MSET', unpack(pairs, from, math.min(from + 2 * SLICE - 1, #pairs)))
  end
end

local function same(one, other) -- event; a byte is cheaper to take than a string, and mostly tells
  return byte(one, MOMENT_WIDTH) == byte(other, MOMENT_WIDTH)
    and sub(one, 1, MOMENT_WIDTH) == sub(other, 1, MOMENT_WIDTH)
end

-- 1. Read.
local counts, newest = values(COUNT), values(NEWEST)
for content, count in ipairs(counts) do
  counts[content] = tonumber(count or '0')
  if not counts[content] then
    return redis.error_reply('WRONGTYPE a count is not a number')
  end
  if not newest[content] then
    redis.call('STRLEN', KEYS[LAST + content]) -- setting it would overwrite a key of any type
  end
end
local bits = {}
for i = 1, N_PAGES do
  bits[i] = redis.call('GET', KEYS[PAGE + i]) or ''
end
for i = 1, N_BUCKETS do
  redis.call('ZCARD', KEYS[BUCKET + i])
  redis.call('STRLEN', KEYS[LOG + i])
end
redis.call('ZCARD', KEYS[1])
redis.call('GET', KEYS[2])

-- 2. Which events are new: the old bit tells. Bits are numbered as SETBIT does, from the left. `marked` has the bytes
--    that change, `places` where they are, `ranks` how many new events each content has in each bucket.
--    This loop runs for every event: no call but one, as a call of Lua's costs as much as the rest of it.
local marked, places, ranks = {}, {}, {}
for i = 1, N_PAGES do
  marked[i], places[i] = {}, {}
end
for i = 0, N_BUCKETS do
  ranks[i] = {}
end
local at = 1
while at < #EVENTS do
  local page, bucket, n = unpacked('<I2I2I2', EVENTS, at)
  local old, mark, found, rank = bits[page], marked[page], places[page], ranks[bucket]
  for event = at + 6, at + 6 + 4 * (n - 1), 4 do
    local bit, high, content, content_high = byte(EVENTS, event, event + 3)
    local mask, place = MASKS[bit % 8], high * 32 + (bit - bit % 8) / 8
    local value = mark[place]
    if not value then
      value = byte(old, place + 1) or 0
      if value % (2 * mask) < mask then
        found[#found + 1] = place
      end
    end
    if value % (2 * mask) < mask then
      mark[place] = value + mask
      content = content + content_high * 256
      rank[content] = (rank[content] or 0) + 1
    end
  end
  at = at + 6 + 4 * n
end
local new, n_new = {}, 0
for i = 0, N_BUCKETS do
  for content, n in pairs(ranks[i]) do
    new[content], n_new = (new[content] or 0) + n, n_new + n
  end
end

-- 3. Keep what is newest. Again it changes nothing.
local moments, totals, texts = {}, {}, {} -- a number becomes text slowly, and most totals are alike
for content = 1, N_CONTENTS do
  local moment = ARGV[MOMENT + content]
  if not newest[content] or newest[content] <= moment then
    moments[#moments + 1] = KEYS[NEWEST + content]
    moments[#moments + 1] = moment
    if newest[content] and same(newest[content], moment) then
      redis.call('SET', KEYS[LAST + content], ARGV[EVENT + content], 'XX', 'KEEPTTL') -- another version of the same event
    else
      redis.call('SETEX', KEYS[LAST + content], KEEP_LAST, ARGV[EVENT + content])
    end
  end
  if new[content] then
    totals[#totals + 1] = KEYS[COUNT + content]
    local total = counts[content] + new[content]
    local text = texts[total]
    if not text then
      text = string.format('%.0f', total)
      texts[total] = text
    end
    totals[#totals + 1] = text
  end
end
set(moments)

-- 4. Use each right that comes after the first mark, to no effect: without it, events would be marked and not counted.
local any = next(new)
if any then
  redis.call('MSET', KEYS[COUNT + any], counts[any])
end
for i, rank in ipairs(ranks) do
  if next(rank) then
    redis.call('APPEND', KEYS[LOG + i], '')
    redis.call('EXPIRE', KEYS[LOG + i], ARGV[KEEP_LOG + i])
  end
end

-- 5. Mark the new events as seen, and count them.
--    Neighbours are written as one, as ids that come together are mostly neighbours.
for page, found in ipairs(places) do
  local mark, from = marked[page], 1
  table.sort(found)
  for i, place in ipairs(found) do
    if found[i + 1] ~= place + 1 then
      local changed = {}
      for j = from, i do
        changed[#changed + 1] = char(mark[found[j]])
      end
      redis.call('SETRANGE', KEYS[PAGE + page], found[from], table.concat(changed))
      from = i + 1
    end
  end
end
set(totals)

-- 6. Log them.
local numbers = {}
for i, rank in ipairs(ranks) do
  local log = {}
  for content, n in pairs(rank) do
    local number = numbers[n]
    if not number then
      number = packed('<I4', n)
      numbers[n] = number
    end
    log[#log + 1] = sub(CONTENTS, 8 * content - 7, 8 * content)
    log[#log + 1] = number
  end
  if #log > 0 then
    redis.call('APPEND', KEYS[LOG + i], table.concat(log))
  end
end
return {n_new}
