<?php
// One story over the API: define a guest, start it, preview two strategies, make a mirror, check and run a migration,
// follow it by events with a resume in the middle, and act on three errors by their codes.
//
// The namespace Mirrorvm is generated from openapi/v1.json by ./run. MIRRORVM_A and MIRRORVM_B are the daemons' URLs,
// MIRRORVM_A_TOKEN and MIRRORVM_B_TOKEN bearer tokens for them.

declare(strict_types=1);

use Mirrorvm\Api;
use Mirrorvm\ApiException;
use Mirrorvm\Model;

/** A daemon. */
final class Daemon
{
    public readonly Api\GuestsApi $guests;
    public readonly Api\MirrorsApi $mirrors;
    public readonly Api\MigrationsApi $migrations;
    public readonly Api\EventsApi $events;

    public function __construct(string $variable)
    {
        [$url, $token] = [getenv($variable), getenv("{$variable}_TOKEN")];
        check($url && $token, "$variable or {$variable}_TOKEN is not set");
        $configuration = (new Mirrorvm\Configuration())->setHost($url)->setAccessToken($token);
        $http = new GuzzleHttp\Client(['timeout' => 60]);
        $this->guests = new Api\GuestsApi($http, $configuration);
        $this->mirrors = new Api\MirrorsApi($http, $configuration);
        $this->migrations = new Api\MigrationsApi($http, $configuration);
        $this->events = new Api\EventsApi($http, $configuration);
    }

    public function get(string $guest): Model\Guest
    {
        return $this->guests->guestGet($guest);
    }

    public function waitFor(string $guest, string $state): Model\Guest
    {
        $now = $this->get($guest);
        while ($now->getState() !== $state) {
            try {
                $now = $this->guests->guestGet($guest, wait: '30s', if_none_match: "\"{$now->getGeneration()}\"");
            } catch (ApiException $e) {
                // 304: nothing has changed yet.
                if ($e->getCode() !== 304) {
                    throw $e;
                }
            }
        }
        return $now;
    }

    public function relabel(string $guest, string $tag): Model\Guest
    {
        $update = new Model\GuestUpdate(['labels' => ['by' => 'php']]);
        return $this->guests->guestUpdate($guest, $update, if_match: $tag);
    }
}

function check(mixed $holds, mixed $what): void
{
    if (!$holds) {
        throw new RuntimeException(is_string($what) ? $what : json_encode($what));
    }
}

/** The code of the problem (RFC 9457) that an operation was refused with: what programs go by. */
function code(ApiException $e): string
{
    return json_decode((string) $e->getResponseBody(), true)['code'];
}

function refused(string $code, callable $call): void
{
    try {
        $call();
    } catch (ApiException $e) {
        check(code($e) === $code, (string) $e->getResponseBody());
        return;
    }
    throw new RuntimeException("nothing refused, expected $code");
}

[$a, $b] = [new Daemon('MIRRORVM_A'), new Daemon('MIRRORVM_B')];
$name = 'php-' . bin2hex(random_bytes(4));

$definition = new Model\GuestCreate([
    'name' => $name,
    'driver' => new Model\DriverEmbedded(['vcpus' => 1]),
    'memory' => new Model\Memory([
        'blocks' => [new Model\MemoryBlock(['name' => 'ram0', 'size_bytes' => 32 << 20, 'gpa' => 0])],
    ]),
]);
$guest = $a->guests->guestCreate($definition);
check($guest->getState() === 'stopped' && $guest->getDriver()->getKind() === 'embedded', $guest);
$a->guests->guestStart($name);
$guest = $a->waitFor($name, 'running');
echo "runs: {$guest->getName()} {$guest->getId()}\n";

// Whatever other guests the daemon has, and whatever drivers run them.
$kinds = array_map(fn ($one) => $one->getDriver()->getKind(), $a->guests->guestList(limit: 1000)->getItems());
check(in_array('embedded', $kinds, true), $kinds);
try {
    $a->get('nobody');
} catch (ApiException $e) {
    echo 'drivers: ', implode(' ', array_unique($kinds)), ' and nobody is ', code($e), "\n";
}

$shifted = new Model\StrategyShifted(['shift' => new Model\ShiftFourGib()]);
foreach ([$shifted, new Model\StrategyIdentityCbit()] as $strategy) {
    try {
        $wanted = new Model\AddressSpacePlanCreate(['strategy' => $strategy]);
        $plan = $a->guests->addressSpacePlanCreate($name, $wanted);
        echo $plan->getStrategy()->getKind(), ' has ', count($plan->getSlots()), " slots\n";
    } catch (ApiException $e) {
        // A host may not execute a strategy; the plan says why.
        check(code($e) === 'plan_refused', (string) $e->getResponseBody());
        echo $e->getResponseBody(), "\n";
    }
}

$mirror = $a->mirrors->mirrorCreate(new Model\MirrorCreate(['guest' => $name, 'strategy' => $shifted]));
check($mirror->getState() === 'ready', $mirror);
$a->mirrors->mirrorDelete($mirror->getId());

$move = new Model\MigrationCreate(['guest' => $name, 'destination' => new Model\DestinationHost(['host' => 'b'])]);
$look = $a->migrations->migrationCheckCreate($move);
check($look->getMigratable(), $look);
$page = $a->events->eventList(limit: 1000);
while ($page->getMore()) {
    $page = $a->events->eventList(after: $page->getNextCursor(), limit: 1000);
}
$cursor = $page->getNextCursor();
$migration = $a->migrations->migrationCreate($move, idempotency_key: "$name-move");
$again = $a->migrations->migrationCreate($move, idempotency_key: "$name-move");
check($again->getId() === $migration->getId(), 'a repeated request has no second effect');

// Events, a few at a time; every call resumes where the last one ended, as a client that was restarted would.
$states = ['queued'];
while (!in_array(end($states), ['succeeded', 'failed', 'canceled'], true)) {
    $some = $a->events->eventList(after: $cursor, resource: [$migration->getId()], limit: 2, wait: '30s');
    foreach ($some->getItems() as $event) {
        if ($event->getType() === 'migration.state_changed') {
            $states[] = $event->getData()->getState();
        }
    }
    $cursor = $some->getNextCursor();
}
echo 'states: ', implode(' ', $states), "\n";
check(end($states) === 'succeeded', $states);
// It is the destination's from then on, and runs there a moment later.
$b->waitFor($name, 'running');

// Three errors, each acted on by its code.
refused('guest_moved', fn () => $a->guests->guestStart($name));
check($b->get($name)->getId() === $guest->getId(), "so it is the other host's now");
refused('name_taken', fn () => $b->guests->guestCreate($definition));
check($b->get($name)->getId() === $guest->getId(), 'so the one that is there will do');
refused('precondition_failed', fn () => $b->relabel($name, '"1"'));
// So it is read again; until nobody has changed it meanwhile, as the audit does when it has come to an end.
$relabelled = null;
while ($relabelled === null) {
    try {
        $relabelled = $b->relabel($name, "\"{$b->get($name)->getGeneration()}\"");
    } catch (ApiException $e) {
        check(code($e) === 'precondition_failed', (string) $e->getResponseBody());
    }
}
check(((array) $relabelled->getLabels())['by'] === 'php', $relabelled->getLabels());

$b->guests->guestStop($name);
$b->waitFor($name, 'stopped');
foreach ([$b, $a] as $daemon) {
    $daemon->guests->guestDelete($name);
}
echo "the story went well with PHP\n";
