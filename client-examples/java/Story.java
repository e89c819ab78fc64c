import java.net.http.HttpClient;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.UUID;
import org.mirrorvm.client.ApiClient;
import org.mirrorvm.client.ApiException;
import org.mirrorvm.client.api.EventsApi;
import org.mirrorvm.client.api.GuestsApi;
import org.mirrorvm.client.api.MigrationsApi;
import org.mirrorvm.client.api.MirrorsApi;
import org.mirrorvm.client.model.*;

/**
 * One story over the API: define a guest, start it, preview two strategies, make a mirror, check and run a migration,
 * follow it by events with a resume in the middle, and act on three errors by their codes.
 *
 * <p>The package org.mirrorvm.client is generated from openapi/v1.json by ./run. MIRRORVM_A and MIRRORVM_B are the
 * daemons' URLs, MIRRORVM_A_TOKEN and MIRRORVM_B_TOKEN bearer tokens for them.
 */
public final class Story {
  /** A daemon. */
  private static final class Daemon {
    final ApiClient client = new ApiClient();
    final GuestsApi guests;
    final MirrorsApi mirrors;
    final MigrationsApi migrations;
    final EventsApi events;

    Daemon(String variable) {
      String url = System.getenv(variable);
      String token = System.getenv(variable + "_TOKEN");
      check(url != null && token != null, variable + " or " + variable + "_TOKEN is not set");
      // The daemon speaks HTTP/1.1; without this the JDK asks for an upgrade with each new connection.
      client.setHttpClientBuilder(HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1));
      client.updateBaseUri(url);
      client.setRequestInterceptor(request -> request.header("Authorization", "Bearer " + token));
      guests = new GuestsApi(client);
      mirrors = new MirrorsApi(client);
      migrations = new MigrationsApi(client);
      events = new EventsApi(client);
    }

    Guest get(String guest) throws ApiException {
      return guests.guestGet(guest, null, null);
    }

    Guest waitFor(String guest, String state) throws ApiException {
      Guest now = get(guest);
      while (!now.getState().equals(state)) {
        try {
          now = guests.guestGet(guest, "30s", "\"" + now.getGeneration() + "\"");
        } catch (ApiException e) {
          // 304: nothing has changed yet.
          if (e.getCode() != 304) throw e;
        }
      }
      return now;
    }

    Guest relabel(String guest, String tag) throws ApiException {
      return guests.guestUpdate(guest, new GuestUpdate().labels(Map.of("by", "java")), null, tag);
    }
  }

  private interface Call {
    void run() throws ApiException;
  }

  private static void check(boolean holds, Object what) {
    if (!holds) throw new AssertionError(what);
  }

  /** The problem (RFC 9457) that an operation was refused with: programs go by its code. */
  private static Problem problem(Daemon daemon, ApiException e) {
    try {
      return daemon.client.getObjectMapper().readValue(e.getResponseBody(), Problem.class);
    } catch (java.io.IOException no) {
      throw new AssertionError(e.getResponseBody(), no);
    }
  }

  private static void refused(String code, Daemon daemon, Call call) {
    try {
      call.run();
    } catch (ApiException e) {
      check(problem(daemon, e).getCode().equals(code), e.getResponseBody());
      return;
    }
    throw new AssertionError("nothing refused, expected " + code);
  }

  public static void main(String[] arguments) throws ApiException {
    Daemon a = new Daemon("MIRRORVM_A");
    Daemon b = new Daemon("MIRRORVM_B");
    String name = "java-" + UUID.randomUUID().toString().substring(0, 8);

    GuestCreate definition =
        new GuestCreate()
            .name(name)
            .driver(new Driver(new DriverEmbedded()))
            .memory(new Memory().addBlocksItem(new MemoryBlock().name("ram0").sizeBytes(32L << 20).gpa(0L)));
    Guest guest = a.guests.guestCreate(definition, null, null);
    check(guest.getState().equals("stopped") && guest.getDriver().getKind().equals("embedded"), guest);
    a.guests.guestStart(name, null, null, null);
    guest = a.waitFor(name, "running");
    System.out.println("runs: " + guest.getName() + " " + guest.getId());

    // Whatever other guests the daemon has, and whatever drivers run them.
    List<String> kinds = new ArrayList<>();
    for (Guest one : a.guests.guestList(null, null, null, 1000, null).getItems()) kinds.add(one.getDriver().getKind());
    check(kinds.contains("embedded"), kinds);
    try {
      a.get("nobody");
    } catch (ApiException e) {
      System.out.println("drivers: " + kinds + " and nobody is " + problem(a, e).getCode());
    }

    Strategy shifted = new Strategy(new StrategyShifted().shift(new Shift(new ShiftFourGib())));
    for (Strategy strategy : List.of(shifted, new Strategy(new StrategyIdentityCbit()))) {
      try {
        AddressSpacePlan plan =
            a.guests.addressSpacePlanCreate(name, new AddressSpacePlanCreate().strategy(strategy), null);
        System.out.println(plan.getStrategy().getKind() + " has " + plan.getSlots().size() + " slots");
      } catch (ApiException e) {
        // A host may not execute a strategy; the plan says why.
        Problem problem = problem(a, e);
        check(problem.getCode().equals("plan_refused"), problem);
        System.out.println(problem.getErrors().get(0).getDetail());
      }
    }

    Mirror mirror = a.mirrors.mirrorCreate(new MirrorCreate().guest(name).strategy(shifted), null, null);
    check(mirror.getState().equals("ready"), mirror);
    a.mirrors.mirrorDelete(mirror.getId().toString(), null);

    MigrationCreate move =
        new MigrationCreate().guest(name).destination(new Destination(new DestinationHost().host("b")));
    MigrationCheck look = a.migrations.migrationCheckCreate(move, null);
    check(look.getMigratable(), look);
    EventList page = a.events.eventList(null, null, null, null, 1000, null);
    while (page.getMore()) page = a.events.eventList(page.getNextCursor(), null, null, null, 1000, null);
    String cursor = page.getNextCursor();
    String key = name + "-move";
    Migration migration = a.migrations.migrationCreate(move, null, key, null);
    Migration again = a.migrations.migrationCreate(move, null, key, null);
    check(again.getId().equals(migration.getId()), "a repeated request has no second effect");

    // Events, a few at a time; every call resumes where the last one ended, as a client that was restarted would.
    List<String> states = new ArrayList<>(List.of("queued"));
    while (!List.of("succeeded", "failed", "canceled").contains(states.get(states.size() - 1))) {
      EventList some =
          a.events.eventList(cursor, null, List.of(migration.getId().toString()), null, 2, "30s");
      for (Event event : some.getItems()) {
        if (event.getType().equals("migration.state_changed")) states.add(event.getData().getState());
      }
      cursor = some.getNextCursor();
    }
    System.out.println("states: " + String.join(" ", states));
    check(states.get(states.size() - 1).equals("succeeded"), states);
    // It is the destination's from then on, and runs there a moment later.
    b.waitFor(name, "running");

    // Three errors, each acted on by its code.
    refused("guest_moved", a, () -> a.guests.guestStart(name, null, null, null));
    check(b.get(name).getId().equals(guest.getId()), "so it is the other host's now");
    refused("name_taken", b, () -> b.guests.guestCreate(definition, null, null));
    check(b.get(name).getId().equals(guest.getId()), "so the one that is there will do");
    refused("precondition_failed", b, () -> b.relabel(name, "\"1\""));
    // So it is read again; until nobody has changed it meanwhile, as the audit does when it has come to an end.
    Guest relabelled = null;
    while (relabelled == null) {
      try {
        relabelled = b.relabel(name, "\"" + b.get(name).getGeneration() + "\"");
      } catch (ApiException e) {
        check(problem(b, e).getCode().equals("precondition_failed"), e.getResponseBody());
      }
    }
    check("java".equals(relabelled.getLabels().get("by")), relabelled.getLabels());

    b.guests.guestStop(name, null, null, null);
    b.waitFor(name, "stopped");
    b.guests.guestDelete(name, null);
    a.guests.guestDelete(name, null);
    System.out.println("the story went well with Java");
  }
}
