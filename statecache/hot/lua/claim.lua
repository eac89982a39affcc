-- Gives, renews and ends claims: one worker's right to move an instance.
--
-- KEYS   the meta of each partition touched. Instance keys and that of the claims (a sorted set of "machine:id" by the ms of
--        their end, for those who look) are built from its prefix and lie in the same slot.
-- ARGV 1 items, a JSON array of [partition index, "machine:id", state that it must be in or "", token of the claim to renew
--        or to end, or "" for a new one]
--      2 nonce of the call, 1 to 8 characters without blanks: a repetition of the call finds the claim by it
--      3 worker, without blanks
--      4 how long the claim lasts from now on, ms; 0 ends it
--      5 '1': give one claim at most; stop at the first item that gets one or is not hot
--      6 '1': a repetition of such a call: look for the claim that it may have been given, first
--
-- Reply  one string. First line: time in ms. Then a line per item (of a call for one: up to the item where it stopped):
--   OK token until state version    given (fencing token <epoch>-<n>, above all that were given before), renewed or ended
--   HELD worker until               another claim is in force: nothing written
--   FENCED worker until             the claim to renew or end is not in force any more (worker and until: who has one, or
--                                   - 0): nothing written
--   STATE state version             it is in another state: nothing written
--   PARKED                          waits behind a dead letter: nothing written
--   MISS cold evicted_to            not hot; cold is 0 when nothing of the partition is cold: nothing written
--   TYPE                            the instance's key is not a hash of ours: nothing written
--   EPOCH | RECOVERING | IDENTITY   not admitted: nothing written
-- Cost   about 6 us a claim, 2 us an item that is passed over.
--@include identity
--@include ready_or_fenced
local call, match, find = redis.call, string.match, string.find
local items, nonce, worker, ttl = cjson.decode(ARGV[1]), ARGV[2], ARGV[3], tonumber(ARGV[4])
local one, here, refused, prefixes, indexes, cold = ARGV[5] == '1', identity(), {}, {}, {}, {}
local time = call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local now_text = string.format('%.0f', now)
for p = 1, #KEYS do
  refused[p] = refusal(KEYS[p], here, '')
  local m = call('HMGET', KEYS[p], 'cold', 'evicted_to')
  prefixes[p], indexes[p] = string.sub(KEYS[p], 1, -5) .. 'i:', string.sub(KEYS[p], 1, -5) .. 'claims'
  cold[p] = (m[1] or '1') .. ' ' .. (m[2] or '0-0')
  if not refused[p] then call('ZCARD', indexes[p]) end -- no sorted set: fails here, before the first write
end

-- What stands in a hash: @, then token, end, nonce and worker of its claim (a claim that has expired counts as none).
local function read(key)
  local found = redis.pcall('HMGET', key, '@', '@c')
  if found.err then return nil, 'TYPE' end
  if not found[1] then return nil, 'MISS' end
  local token, until_ms, own_nonce, holder = match(found[2] or '', '^(%S+) (%d+) (%S+) (%S+)$')
  if token and tonumber(until_ms) <= now then token = nil end
  return found[1], token, until_ms, own_nonce, holder
end

local function answer(item)
  local p, name, wanted, token = unpack(item)
  if refused[p] then return refused[p] end
  local key = prefixes[p] .. name
  local own, held, until_ms, own_nonce, holder = read(key)
  if not own then return held == 'MISS' and (token == '' and 'MISS ' .. cold[p] or 'FENCED - 0') or held end
  local plain, state, version, flags = match(own, '^((%S+) (%d+) %S+ %d+ %d+ %d+) ?(.*)$')
  if not plain then return 'TYPE' end
  if token ~= '' and token ~= held then return held and 'FENCED ' .. holder .. ' ' .. until_ms or 'FENCED - 0' end
  local same = held and (token ~= '' or own_nonce == nonce) -- a repetition is answered whatever has happened since
  if held and not same then return 'HELD ' .. holder .. ' ' .. until_ms end
  if not same and find(flags, 'p', 1, true) then return 'PARKED' end
  if not same and wanted ~= '' and wanted ~= state then return 'STATE ' .. state .. ' ' .. version end

  local others = string.gsub(flags, 'c', '')
  local ending = string.format('%.0f', now + ttl)
  if ttl == 0 then
    call('HSET', key, '@', plain .. (others == '' and '' or ' ' .. others))
    call('HDEL', key, '@c')
    call('ZREM', indexes[p], name)
  else
    held = same and held or (EPOCH .. '-' .. call('HINCRBY', KEYS[p], 'claims', 1))
    call('HSET', key, '@', plain .. ' ' .. others .. 'c',
      '@c', held .. ' ' .. ending .. ' ' .. (same and own_nonce or nonce) .. ' ' .. (same and holder or worker))
    call('ZREMRANGEBYSCORE', indexes[p], '-inf', now_text)
    call('ZADD', indexes[p], ending, name)
  end
  return 'OK ' .. held .. ' ' .. ending .. ' ' .. state .. ' ' .. version
end

local lines, first = { now_text }, 1
if one and ARGV[6] == '1' then
  for n = 1, #items do
    local own, held, _, own_nonce = read(prefixes[items[n][1]] .. items[n][2])
    if own and held and own_nonce == nonce then first = n end
  end
end
for n = 1, #items do
  local item = items[n]
  lines[n + 1] = (n < first and not refused[item[1]]) and 'HELD - 0' or answer(item)
  if one and n >= first and (match(lines[n + 1], '^OK') or match(lines[n + 1], '^MISS')) then break end
end
return table.concat(lines, '\n')
